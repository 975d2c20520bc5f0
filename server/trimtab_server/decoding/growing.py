"""An answer that is generated piece by piece, each piece by a request of its own.

Every request starts from the token ids of prompt and answer so far, so nothing is tokenised twice; the engine finds
them in its prefix cache. What a single request would have noticed across the borders of pieces is noticed here: stop
strings, and characters whose bytes lie in two pieces.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.decoding.candidates import ABORTED
from trimtab_server.decoding.logprobs import checked_record, joined_records
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.engine.base import Candidate, EngineDelta, EngineRequest

_PARTIAL = "\ufffd"
"""What a token shows that ends inside a character."""


@dataclass(frozen=True, slots=True)
class GrownText:
    """The text with one more piece, cut at a stop string that begins before the piece and ends in it.

    Attributes:
        whole: The text.
        stop: The stop string.
        needed: Characters of the piece up to the end of the stop string.
    """

    whole: str
    stop: str | None = None
    needed: int = 0


class GrowingAnswer:
    """What there is of one answer.

    Args:
        run: Its prompt.
        index: Its number among the candidates of the prompt.
        prompt_token_ids: The prompt as the engine sees it.
    """

    def __init__(self, run: PromptRun, index: int, prompt_token_ids: list[int]) -> None:
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.text = ""
        self.token_ids: list[int] = []
        self.num_pieces = 0
        self.discarded_tokens = 0
        self.finish_reason: str | None = None
        self._run = run
        self._started = time.perf_counter()
        self._token_logprobs: list[float] = []
        self._logprobs: dict[str, list[Any]] = {}
        self._records: list[SteeringRecord] = []
        self._stop_reason: str | int | None = None
        self._restriction: dict[str, Any] = {}
        self._num_shown = 0
        self._shown_chars = 0
        self._shown_tokens = 0

    @property
    def max_new_tokens(self) -> int:
        """Tokens that it may still have."""
        max_tokens = self._run.job.max_tokens
        assert max_tokens is not None, "admission asks for max_tokens"
        return max_tokens - len(self.token_ids)

    def request(self, number: int, max_tokens: int) -> EngineRequest:
        """The engine's request for a next piece; those of one piece differ by their numbers."""
        return self._run.job.piece_request(
            self._run.index, self.prompt_token_ids, self.token_ids, self.num_pieces, number, max_tokens
        )

    def with_piece(self, piece: Candidate) -> GrownText:
        """The text that it would have with this piece."""
        before, body = self.text, self._run.job.body
        joined = before + piece.text
        for stop in body.get("stop") or ():
            # The engine sees the piece alone, so it finds every other occurrence itself.
            at = joined.find(stop, max(0, len(before) - len(stop) + 1), len(before) + len(stop) - 1)
            if at >= 0:
                end = at + len(stop)
                kept = joined[: end if body.get("include_stop_str_in_output") else at]
                return GrownText(kept, stop, end - len(before))
        return GrownText(joined)

    async def extend(self, piece: Candidate) -> None:
        """Take a piece in.

        Raises:
            SteeringError: The engine's record of it is missing, or says that steering failed.
        """
        grown = self.with_piece(piece)
        tokens: list[str] = (piece.choice.get("logprobs") or {}).get("tokens") or []
        num = len(piece.token_ids)
        if grown.stop is not None:
            num = _tokens_for(tokens, grown.needed, num)
        self.discarded_tokens += len(piece.token_ids) - num
        if piece.steering is not None and piece.steering.record:
            found = await self._run.engine.take_records([piece.steering.uid])
            self._records.append(checked_record(piece, found.get(piece.steering.uid), num))
        self._restriction = {name: piece.choice[name] for name in ("black_box",) if name in piece.choice}
        shift = len(self.text)
        for key, values in (piece.choice.get("logprobs") or {}).items():
            if isinstance(values, list):
                moved = [value + shift for value in values] if key == "text_offset" else values
                self._logprobs.setdefault(key, []).extend(moved[:num])
        is_last = len(piece.token_ids) >= self.max_new_tokens
        self.token_ids = self.token_ids + piece.token_ids[:num]
        self._token_logprobs += piece.token_logprobs[:num]
        self.text = grown.whole
        self.num_pieces += 1
        if grown.stop is not None:
            self.finish_reason, self._stop_reason = "stop", grown.stop
        elif piece.finish_reason != "length" or is_last:
            self.finish_reason, self._stop_reason = piece.finish_reason, piece.choice.get("stop_reason")
        if tokens and (_PARTIAL in tokens[0] or _PARTIAL in tokens[-1]) and piece.finish_reason == "length":
            self.text = await self._detokenized()  # a character lies in two pieces; each alone has lost it
        held = 0 if self.finish_reason is not None else self._held_back()
        self._num_shown = max(self._num_shown, len(self.text) - held)

    def candidate(self) -> Candidate:
        """The answer as an engine would have given it; one that has no end has been stopped."""
        job = self._run.job
        finish_reason = self.finish_reason or ABORTED
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": finish_reason,
            "stop_reason": self._stop_reason,
            "token_ids": self.token_ids,
            "prompt_token_ids": self.prompt_token_ids,
            **self._restriction,
        }
        if job.endpoint == "completions":
            choice |= {"text": self.text, "logprobs": self._logprobs or None}
        else:
            choice["message"] = {"role": "assistant", "content": self.text}
            choice["logprobs"] = self._chat_logprobs(slice(None))
        num_prompt, num_output = len(self.prompt_token_ids), len(self.token_ids)
        steering = job.steering(f"{job.id}-{self._run.index}-{self.index}")
        record = joined_records(steering.uid, self._records) if steering is not None and self._records else None
        return Candidate(
            index=self.index,
            choice=choice,
            text=self.text,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=self.token_ids,
            token_logprobs=self._token_logprobs,
            finish_reason=finish_reason,
            usage={
                "prompt_tokens": num_prompt,
                "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output,
            },
            duration_s=time.perf_counter() - self._started,
            steering=steering,
            record=record,
            engine=self._run.engine.name,
        )

    def take_new(self) -> EngineDelta:
        """What is new since the last call, as an engine would have streamed it; ends that may be stop strings wait."""
        tokens, first = slice(self._shown_tokens, None), self._shown_tokens == 0
        start, self._shown_tokens = self._shown_chars, len(self.token_ids)
        text, self._shown_chars = self.text[start : self._num_shown], self._num_shown
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason, "stop_reason": self._stop_reason}
        if self._run.job.endpoint == "completions":
            choice |= {"text": text, "logprobs": {key: values[tokens] for key, values in self._logprobs.items()}}
        else:
            choice |= {"delta": {"content": text}, "logprobs": self._chat_logprobs(tokens)}
        return EngineDelta(
            choice=choice,
            token_ids=self.token_ids[tokens],
            token_logprobs=self._token_logprobs[tokens],
            prompt_token_ids=self.prompt_token_ids if first else None,
        )

    def _chat_logprobs(self, tokens: slice) -> dict[str, Any] | None:
        """The log-probabilities of some tokens in the form of chat completions."""
        if not self._logprobs:
            return None
        num_top = self._run.job.body.get("top_logprobs") or 0
        names = ("tokens", "token_logprobs", "top_logprobs")
        content = []
        for token, logprob, top in zip(*(self._logprobs[name][tokens] for name in names), strict=True):
            likeliest = sorted((top or {}).items(), key=lambda item: -item[1])[:num_top]
            content.append({**_entry(token, logprob), "top_logprobs": [_entry(*item) for item in likeliest]})
        return {"content": content}

    async def _detokenized(self) -> str:
        prompt, whole = await asyncio.gather(
            self._run.detokenize(self.prompt_token_ids),
            self._run.detokenize(self.prompt_token_ids + self.token_ids),
        )
        return whole[len(prompt) :].rstrip(_PARTIAL) if whole.startswith(prompt) else self.text

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        body = self._run.job.body
        if body.get("include_stop_str_in_output"):
            return 0
        stops = body.get("stop") or ()
        return max((n for stop in stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}


def _tokens_for(tokens: Sequence[str], num_chars: int, num_tokens: int) -> int:
    """How many tokens it takes to say so many characters."""
    said = 0
    for i, token in enumerate(tokens):
        said += len(token)
        if said >= num_chars:
            return i + 1
    return num_tokens
