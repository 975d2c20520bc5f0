"""What a request asks of an engine without vLLM: its prompt as token ids, how to sample, when to end.

Whatever such an engine cannot do is refused here. Nothing is ignored.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.errors import EngineRequestError, InvalidRequestError
from trimtab_adapters.contract.sampling import ContextLimits, SamplingRules
from trimtab_server.engine.answer_text import Tokenizer
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.base_kinds import BaseKind

_SAMPLING = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "logit_bias"),
        *("allowed_token_ids", "min_tokens", "ignore_eos", "stop_token_ids", "seed"),
    }
)
_TEXT = frozenset({"stop", "include_stop_str_in_output", "skip_special_tokens"})
_LENGTH_AND_FORM = frozenset(
    {
        *("max_tokens", "max_completion_tokens"),
        *("logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids"),
    }
)
_RENDERING = frozenset(
    {
        *("add_special_tokens", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
        *("prompt", "messages"),
    }
)
_NEUTRAL: Mapping[str, object] = {
    "repetition_penalty": 1.0,
    "echo": False,
    "spaces_between_special_tokens": True,
    "watermarking": False,
    "parallel_tool_calls": True,
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "priority": 0,
}
"""Values that ask for nothing; other values of these fields are refused. So do False and what is empty."""

_OWN_ARGUMENTS = frozenset(
    {
        *("chat_template", "conversation", "tokenize", "return_dict", "return_tensors", "padding", "truncation"),
        *("max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "tools", "documents"),
    }
)


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One candidate.

    Attributes:
        prompt_token_ids: At least one.
        max_tokens: Most tokens of the answer.
        rules: How each is sampled.
        stops: Strings that end it.
        stop_is_included: Whether such a string belongs to the text.
        stop_token_ids: Tokens that end it, beside the base's own.
        ending_ids: All of these; none when a request ignores the base's own and names no other.
        skip_special_tokens: Whether the text leaves them out.
        num_begun: How many ids at the end of the prompt are the answer so far.
        passed_on: Fields for the API, when it can give the whole answer by itself; None when it cannot: the answer is
            steered, or the API does not understand a field.
    """

    prompt_token_ids: list[int]
    max_tokens: int
    rules: SamplingRules
    stops: tuple[str, ...]
    stop_is_included: bool
    stop_token_ids: frozenset[int]
    ending_ids: frozenset[int]
    skip_special_tokens: bool
    passed_on: dict[str, Any] | None
    num_begun: int = 0


class RequestReader:
    """Reads engine requests.

    Args:
        tokenizer: The base's.
        limits: How long prompt and answer may be.
        kind: What the base can do.
    """

    def __init__(self, tokenizer: Tokenizer, limits: ContextLimits, kind: BaseKind) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._kind = kind

    def read(self, request: EngineRequest) -> SamplingRequest:
        """The request in our terms.

        Raises:
            InvalidRequestError: It asks for something that the engine cannot do.
            EngineRequestError: The prompt does not fit, as vLLM would refuse it.
        """
        body = request.body
        self._refuse(body)
        prompt = self.prompt_of(body, is_chat=request.endpoint == "chat.completions")
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        num_left = self._num_left(len(prompt) - request.num_begun, request.num_begun, asked or 1)
        stop_ids = frozenset(body.get("stop_token_ids") or ())
        ending = stop_ids if body.get("ignore_eos") else stop_ids | self._tokenizer.eos_token_ids
        stops = body.get("stop") or ()
        asked_for = {name for name in body.keys() & (_SAMPLING | _TEXT) if not _is_default(name, body[name])}
        is_plain = request.steering is None or not request.steering.needs_row
        is_whole = is_plain and self._kind.passed_on is not None and asked_for <= self._kind.passed_on
        if not is_whole and not self._kind.shows_all:
            self._refuse_unseen(body)
        return SamplingRequest(
            prompt_token_ids=prompt,
            max_tokens=num_left if asked is None else asked,
            rules=self._rules(request, ending),
            stops=(stops,) if isinstance(stops, str) else tuple(stops),
            stop_is_included=bool(body.get("include_stop_str_in_output")),
            stop_token_ids=stop_ids,
            ending_ids=ending,
            skip_special_tokens=body.get("skip_special_tokens", True),
            passed_on={name: body[name] for name in sorted(asked_for)} if is_whole else None,
            num_begun=request.num_begun,
        )

    def _num_left(self, num_prompt: int, num_begun: int, num_asked: int) -> int:
        """How much longer an answer may be. Raises `EngineRequestError` where that is less than what is asked for."""
        limits = self._limits
        num_left = min(limits.output, limits.total - num_prompt) - num_begun
        if num_prompt <= limits.prompt and num_asked <= num_left:
            return num_left
        own = "" if limits.prompt == limits.total - 1 else f", {limits.prompt} of them for the prompt"
        raise EngineRequestError(
            f"This model's maximum context length is {limits.total} tokens{own}. However, your request has "
            f"{num_prompt + num_begun} input tokens and asks for {num_asked} more. Please reduce either of them.",
            engine_status=400,
        )

    def prompt_of(self, body: Mapping[str, Any], *, is_chat: bool) -> list[int]:
        """The prompt as token ids, as vLLM makes them: chat templates write their special tokens themselves.

        Raises:
            InvalidRequestError: The messages cannot be rendered, or there are no tokens.
            EngineRequestError: An id that the model does not have.
        """
        if is_chat:
            text: str | list[int] = self._tokenizer.render(self._texts(body["messages"]), self._template_options(body))
        else:
            text = body["prompt"]
        if isinstance(text, str):
            special = body.get("add_special_tokens")
            ids = self._tokenizer.encode(text, add_special_tokens=not is_chat if special is None else special)
        else:
            ids = list(text)
        if not ids:
            raise InvalidRequestError("The prompt has no tokens.", param="messages" if is_chat else "prompt")
        if max(ids) >= self._tokenizer.num_tokens:
            raise EngineRequestError(f"Token id {max(ids)} is out of vocabulary", engine_status=400)
        return ids

    def tokenize(self, body: Mapping[str, Any]) -> list[int]:
        """The ids of what a caller wants tokenised; nothing of it was checked before. Raises as `prompt_of`."""
        prompt, messages = body.get("prompt"), body.get("messages")
        if body.get("chat_template") is not None:
            raise self._refusal("chat_template", "the gateway's own tokenizer has one")
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return self.prompt_of(body, is_chat=True)
        if not isinstance(prompt, str):
            raise InvalidRequestError("'prompt' must be a string, or 'messages' an array of objects.", param="prompt")
        return self.prompt_of(body, is_chat=False)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """`/tokenize` and `/detokenize` as vLLM has them. Raises as `prompt_of`, and 404 for other paths."""
        if path == "/tokenize":
            token_ids = await asyncio.to_thread(self.tokenize, body)
            limit = self._limits.total
            return {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": None}
        if path == "/detokenize":
            token_ids = self.token_ids(body.get("tokens"))
            return {"prompt": await asyncio.to_thread(self._tokenizer.decode, token_ids, skip_special_tokens=False)}
        raise EngineRequestError("Not Found", engine_status=404)

    def token_ids(self, value: object) -> list[int]:
        """Ids that a caller sent. Raises `InvalidRequestError` when they are none of the tokenizer's."""
        num_tokens = self._tokenizer.num_tokens
        if not isinstance(value, list) or not all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token < num_tokens for token in value
        ):
            raise InvalidRequestError(f"'tokens' must be an array of ids from 0 to {num_tokens - 1}.", param="tokens")
        return value

    def _rules(self, request: EngineRequest, ending: frozenset[int]) -> SamplingRules:
        body = request.body
        bias = {int(token_id): float(value) for token_id, value in (body.get("logit_bias") or {}).items()}
        allowed = body.get("allowed_token_ids")
        named = [*bias, *(allowed or ()), *(body.get("stop_token_ids") or ())]
        if unknown := [token_id for token_id in named if token_id >= self._tokenizer.num_tokens]:
            raise EngineRequestError(f"Token id {unknown[0]} is out of vocabulary", engine_status=400)
        num_top = body.get("top_logprobs") if request.endpoint == "chat.completions" else body.get("logprobs")
        top_k = body.get("top_k") or 0
        return SamplingRules(
            temperature=_given(body, "temperature", 1.0),
            top_p=_given(body, "top_p", 1.0),
            top_k=max(0, top_k),
            min_p=_given(body, "min_p", 0.0),
            frequency_penalty=_given(body, "frequency_penalty", 0.0),
            presence_penalty=_given(body, "presence_penalty", 0.0),
            logit_bias=bias,
            allowed_token_ids=None if allowed is None else frozenset(allowed),
            min_tokens=body.get("min_tokens") or 0,
            ending_ids=ending,
            num_top=int(num_top or 0),
            seed=body.get("seed"),
        )

    def _refuse(self, body: Mapping[str, Any]) -> None:
        for name, value in body.items():
            is_known = name in _SAMPLING | _TEXT | _LENGTH_AND_FORM | _RENDERING and name not in self._kind.cannot
            if is_known or value is None:
                continue
            is_empty = (value is False or value in ([], {})) and name != "spaces_between_special_tokens"
            if is_empty or (name in _NEUTRAL and value == _NEUTRAL[name]):
                continue
            raise self._refusal(name, self._kind.why.get(name, self._kind.why_else))

    def _refuse_unseen(self, body: Mapping[str, Any]) -> None:
        """Refuse what may be for tokens that the API does not show and that cannot be sampled therefore."""
        if any(value > 0 for value in (body.get("logit_bias") or {}).values()):
            raise self._refusal("logit_bias", "a positive bias may be for a token that the API does not show")
        if body.get("allowed_token_ids") is not None:
            raise self._refusal("allowed_token_ids", "the API may show none of them")

    def _texts(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose contents are texts; parts of text are put together."""
        flat: list[dict[str, Any]] = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):
                if any(part.get("type") not in ("text", "refusal") for part in content if isinstance(part, dict)):
                    raise self._refusal("messages", self._kind.why["content"])
                content = "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
            flat.append({**message, "content": content or ""})
        return flat

    def _template_options(self, body: Mapping[str, Any]) -> dict[str, Any]:
        variables = dict(body.get("chat_template_kwargs") or {})
        if forbidden := sorted(variables.keys() & _OWN_ARGUMENTS):
            raise self._refusal(f"chat_template_kwargs.{forbidden[0]}", "it is no variable of a chat template")
        continues = bool(body.get("continue_final_message"))
        generates = body.get("add_generation_prompt")
        return {
            **variables,
            "add_generation_prompt": not continues if generates is None else generates,
            "continue_final_message": continues,
        }

    def _refusal(self, name: str, why: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"'{name}' is not supported with {self._kind.name}: {why}.", param=name, code="unsupported_parameter"
        )


def _given(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    return default if value is None else float(value)


def _is_default(name: str, value: object) -> bool:
    """Whether a sampling field asks for nothing."""
    defaults: dict[str, tuple[object, ...]] = {
        **dict.fromkeys(("temperature", "top_p"), (1.0,)),
        **dict.fromkeys(("min_p", "frequency_penalty", "presence_penalty", "min_tokens"), (0.0,)),
        **dict.fromkeys(("ignore_eos", "include_stop_str_in_output"), (False,)),
        "skip_special_tokens": (True,),
        "top_k": (0, -1),
    }
    return value is None or value == [] or value == {} or value in defaults.get(name, ())
