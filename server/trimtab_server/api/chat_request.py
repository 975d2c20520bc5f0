"""The body of `POST /v1/chat/completions`: OpenAI's fields, vLLM's extras and ours.

Messages, tools and formats are passed to the engine, whose chat template and parsers judge them.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import override

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_server.api.request_fields import MAX_LOGPROBS, GenerationBody
from trimtab_server.api.validation import type_name
from trimtab_server.decoding.job import PromptInput

_REFUSED = {
    "functions": "it is deprecated; use 'tools'",
    "function_call": "it is deprecated; use 'tool_choice'",
    "audio": "this server generates text only",
    "prediction": "predicted outputs are not available",
    "web_search_options": "this server does not search the web",
}


def _messages(value: Any) -> Any:
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"Invalid type for 'messages': expected an array of objects, but got {type_name(value)} instead.",
            param="messages",
            code="invalid_type",
        )
    if not value:
        raise InvalidRequestError(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            param="messages",
            code="empty_array",
        )
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InvalidRequestError(
                f"Invalid type for 'messages[{i}]': expected an object, but got {type_name(message)} instead.",
                param=f"messages[{i}]",
                code="invalid_type",
            )
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"Missing required parameter: 'messages[{i}].role'.",
                param=f"messages[{i}].role",
                code="missing_required_parameter",
            )
        if not isinstance(message.get("content"), str | list | None):
            raise InvalidRequestError(
                f"Invalid type for 'messages[{i}].content': expected a string or an array of objects, but got "
                f"{type_name(message['content'])} instead.",
                param=f"messages[{i}].content",
                code="invalid_type",
            )
    return value


def _tool_choice(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise InvalidRequestError("Invalid 'tool_choice': expected a string or an object.", param="tool_choice")
    return value


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`. `best_of` is an extension of ours; OpenAI's chat route does not have it."""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(_messages)]
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    modalities: list[str] | None = None
    # OpenAI's bookkeeping: accepted, without effect on what is generated
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # vLLM's chat extras
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, why in _REFUSED.items():
            if isinstance(data, dict) and data.get(name) is not None:
                raise InvalidRequestError(
                    f"'{name}' is not supported: {why}.", param=name, code="unsupported_parameter"
                )
        return {k: v for k, v in data.items() if k not in _REFUSED} if isinstance(data, dict) else data

    @override
    def prompts(self) -> tuple[PromptInput, ...]:
        return (PromptInput({"messages": self.messages}, "\n".join(_text(message) for message in self.messages)),)

    @property
    @override
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def has_media(self) -> bool:
        """Whether a message has a part that is not text."""
        parts = [
            part for message in self.messages if isinstance(message.get("content"), list) for part in message["content"]
        ]
        return any(isinstance(part, dict) and part.get("type") not in ("text", "refusal") for part in parts)

    @override
    def engine_fields(self) -> dict[str, Any]:
        fields = {**self.passed_on(), "logprobs": True, "return_token_ids": True}
        if self.top_logprobs is not None:
            fields["top_logprobs"] = self.top_logprobs
        if self.echo is not None:
            fields["echo"] = self.echo
        if self.stream and self.stream_interval is not None:
            fields["stream_interval"] = self.stream_interval
        return fields

    @override
    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
        if self.logprob_token_ids is not None and not self.logprobs:
            raise InvalidRequestError("'logprob_token_ids' needs 'logprobs'.", param="logprob_token_ids")
        if self.include_reasoning is False:
            raise InvalidRequestError(
                "'include_reasoning': false is not supported: it hides the token ids that steering is checked by.",
                param="include_reasoning",
                code="unsupported_parameter",
            )
        if self.modalities is not None and self.modalities != ["text"]:
            raise InvalidRequestError("'modalities' may only be [\"text\"].", param="modalities")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content or ""
