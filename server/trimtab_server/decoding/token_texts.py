"""Texts of single tokens, by the engine's tokenizer."""

import asyncio
from collections.abc import Iterable

from trimtab_server.decoding.shared_lookup import SharedLookup
from trimtab_server.engine.base import Engine

MAX_KEPT = 262_144
"""Texts to remember; more than almost every vocabulary has."""

MAX_CONCURRENT = 16
"""Questions to the engine at the same time."""


class TokenTexts:
    """Asks the engine once for each token.

    Args:
        engine: Its `/detokenize` is asked.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._lookup: SharedLookup[int, str] = SharedLookup(self._ask, max_weight=MAX_KEPT)

    async def of(self, token_ids: Iterable[int]) -> dict[int, str]:
        """The text of each of these tokens, as it is by itself: part of a character becomes U+FFFD.

        Raises:
            EngineError: The engine did not say.
        """
        distinct = list(dict.fromkeys(token_ids))
        texts = await asyncio.gather(*(self._lookup.get(token_id) for token_id in distinct))
        return dict(zip(distinct, texts, strict=True))

    async def _ask(self, token_id: int) -> str:
        async with self._slots:
            return str((await self._engine.post("/detokenize", {"tokens": [token_id]}))["prompt"])
