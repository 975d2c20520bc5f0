"""The public API's calls, each as an `Operation`; written once for both clients."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_client._base import Operation, given, path_of
from trimtab_client._decode import decode, decode_list
from trimtab_client.types import (
    ChatCompletion,
    ChatParams,
    Completion,
    CompletionParams,
    Feedback,
    FeedbackParams,
    Message,
    Model,
    Prompt,
)


def create_completion(model: str, prompt: Prompt, params: CompletionParams, *, stream: bool) -> Operation[Completion]:
    """`POST /v1/completions`."""
    body = _body({"model": model, "prompt": prompt}, params, stream=stream)
    return Operation("POST", "/v1/completions", lambda value: decode(Completion, value), body)


def create_chat(
    model: str, messages: Sequence[Message], params: ChatParams, *, stream: bool
) -> Operation[ChatCompletion]:
    """`POST /v1/chat/completions`."""
    body = _body({"model": model, "messages": list(messages)}, params, stream=stream)
    return Operation("POST", "/v1/chat/completions", lambda value: decode(ChatCompletion, value), body)


def give_feedback(completion_id: str | None, request_id: str | None, params: FeedbackParams) -> Operation[Feedback]:
    """`POST /v1/feedback`."""
    body = {**given(completion_id=completion_id, request_id=request_id), **params}
    return Operation("POST", "/v1/feedback", lambda value: decode(Feedback, value), body)


def list_models() -> Operation[list[Model]]:
    """`GET /v1/models`."""
    return Operation("GET", "/v1/models", lambda value: decode_list(Model, value))


def get_model(model: str) -> Operation[Model]:
    """`GET /v1/models/{id}`."""
    return Operation("GET", path_of("v1", "models", model), lambda value: decode(Model, value))


def _body(required: dict[str, Any], params: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    fields = {**required, **params}
    extra = fields.pop("extra_body", None) or {}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return {**fields, **extra}
