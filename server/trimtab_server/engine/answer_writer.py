"""Answers whose tokens were sampled outside vLLM, written in vLLM's shapes."""

from collections.abc import Sequence
from typing import Any

from trimtab_adapters.contract.sampling import SampledToken
from trimtab_server.engine.answer_text import TextPiece, Tokenizer
from trimtab_server.engine.base import EngineDelta, EngineRequest
from trimtab_server.engine.black_box_cost import Cost


class AnswerWriter:
    """Writes the deltas of one candidate.

    Args:
        request: The engine's request.
        prompt_token_ids: Its prompt.
        tokenizer: Texts of tokens.
        num_top: Alternatives per token.
        restriction: What the answer's tokens were sampled from, where that was not the whole distribution.
    """

    def __init__(
        self,
        request: EngineRequest,
        prompt_token_ids: list[int],
        tokenizer: Tokenizer,
        num_top: int,
        restriction: dict[str, Any] | None = None,
    ) -> None:
        self._is_chat = request.endpoint == "chat.completions"
        self._shows_ids = bool(request.body.get("return_tokens_as_token_ids"))
        self._prompt = prompt_token_ids
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._restriction = restriction
        self._num_tokens = 0
        self._offset = 0
        self._is_first = True

    def opening(self) -> EngineDelta | None:
        """What comes before the first token: of a chat its role. None when there is nothing, or it was given before.

        Not to be sent earlier: an error before it still has a status of its own.
        """
        if not (self._is_chat and self._is_first):
            return None
        self._is_first = False
        delta = {"role": "assistant", "content": ""}
        return EngineDelta(choice={"index": 0, "delta": delta}, prompt_token_ids=self._prompt)

    def delta(self, piece: TextPiece, tokens: Sequence[SampledToken], cost: Cost | None = None) -> EngineDelta:
        """A piece; with what the answer has cost up to here, so that one that is stopped is accounted for."""
        self._num_tokens += len(tokens)
        token_ids = [token.token_id for token in tokens]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "token_ids": token_ids,
        }
        if self._restriction is not None:
            choice["black_box"] = self._restriction
        if self._is_chat:
            choice |= {"delta": {"content": piece.text}, "logprobs": {"content": [self._entry(t) for t in tokens]}}
        else:
            choice |= {"text": piece.text, "logprobs": self._legacy(tokens)}
        is_first, self._is_first = self._is_first, False
        return EngineDelta(
            choice=choice,
            token_ids=token_ids,
            token_logprobs=[token.logprob for token in tokens],
            prompt_token_ids=self._prompt if is_first else None,
            usage=None if cost is None else self._usage(cost),
        )

    def usage(self, cost: Cost | None = None) -> EngineDelta:
        """The last delta: how long the answer is, and what it cost where somebody bills it."""
        return EngineDelta(choice={}, usage=self._usage(cost))

    def _usage(self, cost: Cost | None) -> dict[str, Any]:
        num_prompt = len(self._prompt)
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt + self._num_tokens,
        }
        return usage if cost is None else usage | {"black_box": cost.to_usage()}

    def _shown(self, token_id: int) -> str:
        if self._shows_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _legacy(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        names = [self._shown(token.token_id) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        tops = [
            {name: token.logprob} | {self._shown(token_id): logprob for token_id, logprob in token.top[: self._num_top]}
            for name, token in zip(names, tokens, strict=True)
        ]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _entry(self, token: SampledToken) -> dict[str, Any]:
        top = [self._plain(token_id, logprob) for token_id, logprob in token.top[: self._num_top]]
        return {**self._plain(token.token_id, token.logprob), "top_logprobs": top}

    def _plain(self, token_id: int, logprob: float) -> dict[str, Any]:
        name = self._shown(token_id)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode("utf-8", "replace"))}
