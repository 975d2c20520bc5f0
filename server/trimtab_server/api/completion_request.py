"""The body of `POST /v1/completions`: every field of OpenAI's legacy completions, vLLM's extras and ours."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from typing_extensions import override

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_server.api.request_fields import MAX_LOGPROBS, GenerationBody
from trimtab_server.api.validation import type_name
from trimtab_server.decoding.job import PromptInput

MAX_PROMPTS = 1024
"""vLLM's own limit."""
DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


def _prompt_list(value: Any) -> Any:
    """All four forms (text, texts, ids, lists of ids) as a list of prompts."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and all(_is_int(item) for item in value):
        prompts = [value]
    elif isinstance(value, list):
        prompts = value
    else:
        raise _invalid_prompt(
            f"expected a string, an array of strings or token ids, but got {type_name(value)} instead"
        )
    if not prompts:
        raise _invalid_prompt("the array is empty")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequestError(
            f"Invalid 'prompt': array too long. Expected an array with maximum length {MAX_PROMPTS}, but got an array "
            f"with length {len(prompts)} instead.",
            param="prompt",
            code="array_above_max_length",
        )
    are_texts = all(isinstance(prompt, str) for prompt in prompts)
    if not are_texts and not all(isinstance(p, list) and all(_is_int(item) for item in p) for p in prompts):
        raise _invalid_prompt("an array must hold only strings, only token ids, or only arrays of token ids")
    if any(len(prompt) == 0 for prompt in prompts):
        raise _invalid_prompt("a prompt must not be empty")
    if not are_texts and any(not 0 <= token < 2**31 for prompt in prompts for token in prompt):
        raise _invalid_prompt("a token id must not be negative or larger than 2147483647")
    return prompts


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid_prompt(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid 'prompt': {reason}.", param="prompt", code="invalid_prompt")


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[list[Any], BeforeValidator(_prompt_list)]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=0)
    suffix: str | None = None

    @override
    def prompts(self) -> tuple[PromptInput, ...]:
        return tuple(
            PromptInput({"prompt": prompt}, prompt if isinstance(prompt, str) else None) for prompt in self.prompt
        )

    @property
    @override
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @override
    def engine_fields(self) -> dict[str, Any]:
        fields = {
            **self.passed_on(),
            "max_tokens": self.max_tokens,
            "logprobs": self.logprobs or 0,
            "return_token_ids": True,
        }
        # The gateway puts the prompt's text before the answer itself: with `return_token_ids` vLLM leaves it out. The
        # engine is asked to echo only where the prompt's log-probabilities are wanted, which cost it a full prefill.
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            fields["echo"] = True
        if self.stream and self.stream_interval is not None:
            fields["stream_interval"] = self.stream_interval
        return fields

    @override
    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "'max_tokens' may be 0 only with 'echo': nothing else would be returned.", param="max_tokens"
            )
        if self.logprob_token_ids is not None and self.logprobs is None:
            raise InvalidRequestError("'logprob_token_ids' needs 'logprobs'.", param="logprob_token_ids")
