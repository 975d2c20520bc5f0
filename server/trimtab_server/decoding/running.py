"""A candidate in the making that can be watched and stopped."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from trimtab_adapters.contract.errors import EngineDiedError
from trimtab_server.decoding.candidates import ABORTED
from trimtab_server.engine.base import Candidate, Engine, EngineDelta, EngineRequest
from trimtab_server.engine.candidate_builder import CandidateBuilder


class RunningCandidate:
    """Reads a candidate from the engine until it ends or is stopped.

    Args:
        engine: Where it is generated.
        request: The engine's request.
        index: Its number among the candidates of its prompt.

    Attributes:
        is_stopped: Whether it was stopped before its end.
        is_given_up: Whether it shall not be chosen, although it may have come to its end before it could be stopped.
    """

    def __init__(self, engine: Engine, request: EngineRequest, index: int) -> None:
        self.index = index
        self.request = request
        self._engine = engine
        self._builder = CandidateBuilder(request, engine.name, index=index)
        self._ends: list[tuple[int, int]] = []
        self._num_chars = 0
        self._limit = math.inf
        self._has_ended = False
        self.is_stopped = False
        self.is_given_up = False
        self._is_over = False
        self._progress = asyncio.Condition()
        self._task = asyncio.create_task(self._read())

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._builder.token_ids)

    @property
    def prompt_token_ids(self) -> list[int]:
        """As the engine saw them; empty before the first token."""
        return self._builder.prompt_token_ids

    @property
    def is_finished(self) -> bool:
        """Whether it came to its own end."""
        return self._has_ended

    async def result(self) -> Candidate | None:
        """The finished candidate; None when it was stopped before its end. Raises what `Engine.stream` raises."""
        await asyncio.wait({self._task})
        if self.is_stopped:
            return None
        self._task.result()
        return self._builder.candidate()

    async def reach(self, num_tokens: int) -> None:
        """Wait until it has so many tokens or has ended. Raises what `Engine.stream` raises."""
        async with self._progress:
            await self._progress.wait_for(lambda: self.num_tokens >= num_tokens or self._is_over)
        if self._is_over and not self.is_stopped:
            await self._task

    def limit(self, num_tokens: int) -> None:
        """Stop it as soon as it has more tokens than this without having ended."""
        self._limit = min(self._limit, num_tokens)
        if self.num_tokens > self._limit:
            self.stop()

    def stop(self) -> None:
        """Stop it, which aborts the engine's work; nothing happens when it has ended."""
        if not self._has_ended and not self._task.done():
            self.is_stopped = True
            self._task.cancel()

    def give_up(self) -> None:
        """Stop it, and remember that it shall not be chosen where it has ended already."""
        self.is_given_up = True
        self.stop()

    async def stopped(self) -> Candidate:
        """What there is of a candidate that was stopped."""
        await asyncio.wait({self._task})
        candidate = self._builder.candidate()
        candidate.finish_reason = candidate.choice["finish_reason"] = ABORTED
        return candidate

    async def aclose(self) -> None:
        """Stop it and wait for the end of its task, whatever came of it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def text_at(self, num_tokens: int) -> str | None:
        """The text of its first tokens; None where the engine sent no piece that ends with the last of them.

        With fewer tokens than that it is the whole text.
        """
        text = self._builder.text
        if num_tokens >= self.num_tokens:
            return text
        return next((text[:chars] for tokens, chars in self._ends if tokens == num_tokens), None)

    def first_token_ids(self, num_tokens: int) -> list[int]:
        """Ids of its first tokens."""
        return self._builder.token_ids[:num_tokens]

    async def _read(self) -> None:
        try:
            deltas = cast("AsyncGenerator[EngineDelta, None]", self._engine.stream(self.request))
            async with aclosing(deltas):
                async for delta in deltas:
                    self._builder.add(delta)
                    self._ends.append((self.num_tokens, len(self._builder.text)))
                    self._has_ended = self._builder.finish_reason is not None
                    if self.num_tokens > self._limit and not self._has_ended:
                        self.is_stopped = True
                        return
                    async with self._progress:
                        self._progress.notify_all()
            if not self._has_ended:
                raise EngineDiedError("the engine ended its answer without saying why")
        finally:
            self._is_over = True
            async with self._progress:
                self._progress.notify_all()
