"""Stand-ins for what rewards, calibrators and selection are joined to."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from trimtab_server.engine.base import Candidate

MakeCandidate = Callable[..., Candidate]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_candidate(text: str, index: int = 0, token_logprobs: list[float] | None = None) -> Candidate:
    logprobs = [-1.0] if token_logprobs is None else token_logprobs
    return Candidate(
        index=index,
        choice={"text": text},
        text=text,
        prompt_token_ids=[1, 2],
        token_ids=list(range(len(logprobs))),
        token_logprobs=logprobs,
        finish_reason="stop",
        usage={},
        duration_s=0.0,
    )


@pytest.fixture
def candidate() -> MakeCandidate:
    return make_candidate


@dataclass
class ScriptedDraw:
    """A reference policy that says the given texts in turn, and waits for `gate` before each draw."""

    texts: list[str]
    key: str = "base"
    gate: Callable[[], Awaitable[object]] | None = None
    error: Exception | None = None
    asked: list[int] = field(default_factory=list)
    was_cancelled: bool = False

    async def __call__(self, num: int) -> list[Candidate]:
        self.asked.append(num)
        if self.gate is not None:
            try:
                await self.gate()
            except BaseException:
                self.was_cancelled = True
                raise
        if self.error is not None:
            raise self.error
        drawn, self.texts = self.texts[:num], self.texts[num:]
        return [make_candidate(text, i) for i, text in enumerate(drawn)]


@pytest.fixture
def scripted_draw() -> type[ScriptedDraw]:
    return ScriptedDraw
