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
    """

    def __init__(self, engine: Engine, request: EngineRequest, index: int) -> None:
        self.index = index
        self.request = request
        self._engine = engine
        self._builder = CandidateBuilder(request, engine.name, index=index)
        self._limit = math.inf
        self._has_ended = False
        self.is_stopped = False
        self._task = asyncio.create_task(self._read())

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._builder.token_ids)

    async def result(self) -> Candidate | None:
        """The finished candidate; None when it was stopped before its end. Raises what `Engine.stream` raises."""
        await asyncio.wait({self._task})
        if self.is_stopped:
            return None
        self._task.result()
        return self._builder.candidate()

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

    async def _read(self) -> None:
        deltas = cast("AsyncGenerator[EngineDelta, None]", self._engine.stream(self.request))
        async with aclosing(deltas):
            async for delta in deltas:
                self._builder.add(delta)
                self._has_ended = self._builder.finish_reason is not None
                if self.num_tokens > self._limit and not self._has_ended:
                    self.is_stopped = True
                    return
        if not self._has_ended:
            raise EngineDiedError("the engine ended its answer without saying why")
