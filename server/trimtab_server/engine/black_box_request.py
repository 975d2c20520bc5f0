"""What a request asks of a black-box base: its prompt as token ids, how to sample, when to end.

Whatever cannot be done without the base's own logits is refused here. Nothing is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trimtab_adapters.contract.black_box import SamplingRules, UnseenTokens
from trimtab_adapters.contract.errors import EngineRequestError, InvalidRequestError
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.black_box_text import Tokenizer

Api = Literal["openai", "vllm"]
"""How the base's API is spoken to. `openai`: OpenAI's legacy completions and nothing else. `vllm`: vLLM's server, which
gives token ids and understands more fields."""

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

_WHY: Mapping[str, str] = {
    "repetition_penalty": "it multiplies logits, and a black box shows log-probabilities only",
    "response_format": "a grammar needs the base's logits of every token",
    "structured_outputs": "a grammar needs the base's logits of every token",
    "prompt_logprobs": "they would cost a request of their own for the prompt",
    "echo": "log-probabilities of the prompt would cost a request of their own",
    "bad_words": "give the token ids in 'logit_bias' instead",
    "tools": "tool calls need a parser of the base's own server",
}

_OPENAI = frozenset({"temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "stop", "seed"})
_VLLM = frozenset(
    {
        *("top_k", "min_p", "allowed_token_ids", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("include_stop_str_in_output", "skip_special_tokens"),
    }
)
PASSED_ON: Mapping[Api, frozenset[str]] = {"openai": _OPENAI, "vllm": _OPENAI | _VLLM}
"""Fields that an API understands as they are: an unsteered answer that needs no others is one request to it."""

_OWN_ARGUMENTS = frozenset(
    {
        *("chat_template", "conversation", "tokenize", "return_dict", "return_tensors", "padding", "truncation"),
        *("max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "tools", "documents"),
    }
)


@dataclass(frozen=True, slots=True)
class BlackBoxRequest:
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


class RequestReader:
    """Reads engine requests.

    Args:
        tokenizer: The base's.
        max_model_len: Most tokens of prompt and answer together.
        unseen: What becomes of tokens that the API does not show.
        api: What the base's API understands.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, unseen: UnseenTokens, api: Api) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._unseen: UnseenTokens = unseen
        self._passed_on = PASSED_ON[api]

    def read(self, request: EngineRequest) -> BlackBoxRequest:
        """The request in our terms.

        Raises:
            InvalidRequestError: It asks for something that a black box cannot do.
            EngineRequestError: The prompt does not fit, as vLLM would refuse it.
        """
        body = request.body
        self._refuse(body)
        prompt = self.prompt_of(body, is_chat=request.endpoint == "chat.completions")
        num_left = self._max_model_len - len(prompt)
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if num_left < 1 or (asked is not None and asked > num_left):
            raise EngineRequestError(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your request has "
                f"{len(prompt)} input tokens and asks for {asked or 1} more. Please reduce either of them.",
                engine_status=400,
            )
        stop_ids = frozenset(body.get("stop_token_ids") or ())
        ending = stop_ids if body.get("ignore_eos") else stop_ids | self._tokenizer.eos_token_ids
        stops = body.get("stop") or ()
        asked_for = {name for name in body.keys() & (_SAMPLING | _TEXT) if not _is_default(name, body[name])}
        is_whole = asked_for <= self._passed_on and (request.steering is None or not request.steering.needs_row)
        if not is_whole and self._unseen == "exclude":
            _refuse_unseen(body)
        return BlackBoxRequest(
            prompt_token_ids=prompt,
            max_tokens=num_left if asked is None else asked,
            rules=self._rules(request, ending),
            stops=(stops,) if isinstance(stops, str) else tuple(stops),
            stop_is_included=bool(body.get("include_stop_str_in_output")),
            stop_token_ids=stop_ids,
            ending_ids=ending,
            skip_special_tokens=body.get("skip_special_tokens", True),
            passed_on={name: body[name] for name in sorted(asked_for)} if is_whole else None,
        )

    def prompt_of(self, body: Mapping[str, Any], *, is_chat: bool) -> list[int]:
        """The prompt as token ids, as vLLM makes them: chat templates write their special tokens themselves.

        Raises:
            InvalidRequestError: The messages cannot be rendered, or there are no tokens.
            EngineRequestError: An id that the model does not have.
        """
        if is_chat:
            text: str | list[int] = self._tokenizer.render(_texts(body["messages"]), _template_options(body))
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
            raise _refusal("chat_template", "the gateway's own tokenizer has one")
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return self.prompt_of(body, is_chat=True)
        if not isinstance(prompt, str):
            raise InvalidRequestError("'prompt' must be a string, or 'messages' an array of objects.", param="prompt")
        return self.prompt_of(body, is_chat=False)

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
            if name in _SAMPLING | _TEXT | _LENGTH_AND_FORM | _RENDERING or value is None:
                continue
            is_empty = (value is False or value in ([], {})) and name != "spaces_between_special_tokens"
            if is_empty or (name in _NEUTRAL and value == _NEUTRAL[name]):
                continue
            raise _refusal(name, _WHY.get(name, "the gateway cannot do it on behalf of a base behind an API"))


def _refuse_unseen(body: Mapping[str, Any]) -> None:
    """Refuse what may be for tokens that the API does not show and that cannot be sampled therefore."""
    if any(value > 0 for value in (body.get("logit_bias") or {}).values()):
        raise _refusal("logit_bias", "a positive bias may be for a token that the API does not show")
    if body.get("allowed_token_ids") is not None:
        raise _refusal("allowed_token_ids", "the API may show none of them")


def _refusal(name: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"'{name}' is not supported with a black-box base: {why}.", param=name, code="unsupported_parameter"
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


def _texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are texts; parts of text are put together."""
    flat: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            if any(part.get("type") not in ("text", "refusal") for part in content if isinstance(part, dict)):
                raise _refusal("messages", "only text can be sent to it")
            content = "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        flat.append({**message, "content": content or ""})
    return flat


def _template_options(body: Mapping[str, Any]) -> dict[str, Any]:
    variables = dict(body.get("chat_template_kwargs") or {})
    if forbidden := sorted(variables.keys() & _OWN_ARGUMENTS):
        raise _refusal(f"chat_template_kwargs.{forbidden[0]}", "it is no variable of a chat template")
    continues = bool(body.get("continue_final_message"))
    generates = body.get("add_generation_prompt")
    return {
        **variables,
        "add_generation_prompt": not continues if generates is None else generates,
        "continue_final_message": continues,
    }
