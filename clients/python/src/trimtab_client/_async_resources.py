"""The public API's resources of the asyncio client; signatures as in `_resources`."""

from collections.abc import Sequence
from typing import Unpack

from trimtab_client import _operations as operations
from trimtab_client._caller import AsyncCaller
from trimtab_client._stream import AsyncStream
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


class AsyncCompletions:
    """`/v1/completions`."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def create(self, *, model: str, prompt: Prompt, **params: Unpack[CompletionParams]) -> Completion:
        """Complete a prompt and wait for the whole answer.

        Args:
            model: The base model or a route.
            prompt: Text, token ids, or a list of either.
            **params: Optional fields of the request.
        """
        return await self._caller.send(operations.create_completion(model, prompt, params, stream=False))

    def stream(self, *, model: str, prompt: Prompt, **params: Unpack[CompletionParams]) -> AsyncStream[Completion]:
        """Complete a prompt piece by piece; the last chunk carries `usage` and no choice."""
        return AsyncStream(self._caller, operations.create_completion(model, prompt, params, stream=True))


class AsyncChat:
    """`/v1/chat/completions`."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def create(self, *, model: str, messages: Sequence[Message], **params: Unpack[ChatParams]) -> ChatCompletion:
        """Answer a conversation and wait for the whole answer. The model needs a chat template."""
        return await self._caller.send(operations.create_chat(model, messages, params, stream=False))

    def stream(
        self, *, model: str, messages: Sequence[Message], **params: Unpack[ChatParams]
    ) -> AsyncStream[ChatCompletion]:
        """Answer a conversation piece by piece; the last chunk carries `usage` and no choice."""
        return AsyncStream(self._caller, operations.create_chat(model, messages, params, stream=True))


class AsyncFeedbacks:
    """`/v1/feedback`: what people think of answers."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def create(
        self, *, completion_id: str | None = None, request_id: str | None = None, **params: Unpack[FeedbackParams]
    ) -> Feedback:
        """Say what somebody thinks of a choice; the same user's earlier word about it is replaced.

        Args:
            completion_id: The answer's `id`.
            request_id: In its place, the `x-request-id` that the request was sent with.
            **params: What is thought, of which choice, and by whom.
        """
        return await self._caller.send(operations.give_feedback(completion_id, request_id, params))


class AsyncModels:
    """`/v1/models`."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def list(self) -> list[Model]:
        """The base model and all routes."""
        return await self._caller.send(operations.list_models())

    async def get(self, model: str) -> Model:
        """One of them."""
        return await self._caller.send(operations.get_model(model))
