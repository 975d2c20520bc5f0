"""Measures a cap: reads the log, scores what lacks a reward, fits, stores."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_adapters.contract.selection_cap import SelectionCap
from trimtab_server.overoptimization.cap_fit import ScoredPool, choose_max_n, fit_selection_cap
from trimtab_server.overoptimization.sample_pools import PoolCollector, SamplePool
from trimtab_server.overoptimization.selection_caps import SelectionCaps
from trimtab_server.storage.base import RolloutReader

DEFAULT_LIMIT = 50_000
_CHUNK = 64


class Scorer(Protocol):
    """A reward behind its queue."""

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input. Raises `RewardError`."""
        ...


class ScorerLookup(Protocol):
    """Finds rewards by name."""

    async def batched(self, name: str) -> Scorer:
        """Raises `NotFoundError` or `RewardError`."""
        ...


class CapSurvey:
    """Measures caps for one base model, one at a time.

    Args:
        reader: Reads the rollout log.
        flush: Brings acknowledged rollouts to the database.
        rewards: Finds rewards by name.
        caps: Where measured caps go.
        base_model: Whose samples count.
        clock: Unix seconds.
    """

    def __init__(
        self,
        reader: RolloutReader,
        flush: Callable[[], Awaitable[None]],
        rewards: ScorerLookup,
        caps: SelectionCaps,
        base_model: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reader = reader
        self._flush = flush
        self._rewards = rewards
        self._caps = caps
        self._base_model = base_model
        self._clock = clock
        self._running = asyncio.Lock()

    async def list(self) -> Sequence[SelectionCap]:
        """All stored caps, newest first. Raises `StorageError`."""
        return await self._caps.list()

    async def measure(
        self, proxy: str, gold: str, *, route: str | None = None, since: float | None = None, limit: int = DEFAULT_LIMIT
    ) -> SelectionCap:
        """Measure the cap of best-of-N by one reward in terms of another, and store it in place of an older one.

        Rewards that the log knows at the current version are taken from it; others are computed.

        Args:
            proxy: Name of the reward that chooses.
            gold: Name of the reward that is trusted more.
            route: Read rollouts of this route only.
            since: Read rollouts completed at or after this Unix time only.
            limit: Most rollouts to read, oldest first.

        Raises:
            InvalidRequestError: Both names are the same.
            NotFoundError: There is no reward of a name.
            RewardError: A reward could not be computed; a missing one is never 0.
            ConflictError: The log has too little data; the message says what is missing.
            StorageError: The log could not be read or the cap not be stored.
        """
        if proxy == gold:
            raise InvalidRequestError("'proxy' and 'gold' must be two different rewards", param="gold")
        by = await self._rewards.batched(proxy)
        for_ = await self._rewards.batched(gold)
        async with self._running:
            await self._flush()
            collector = PoolCollector(self._base_model)
            async for rollout in self._reader.read(RolloutFilter(route=route, since=since, limit=limit)):
                collector.add(rollout)
            pools, max_n = _usable(collector)
            scored = [
                ScoredPool(
                    pool.prompt_key,
                    await _rewards_of(pool, by, f"{proxy}@{by.version}"),
                    await _rewards_of(pool, for_, f"{gold}@{for_.version}"),
                )
                for pool in pools
            ]
            cap = await asyncio.to_thread(
                fit_selection_cap,
                scored,
                max_n,
                proxy=f"{proxy}@{by.version}",
                gold=f"{gold}@{for_.version}",
                base_model=self._base_model,
                created_at=self._clock(),
                num_rollouts=collector.num_read,
                left_out=collector.left_out,
                route=route,
            )
            await self._caps.put(cap)
        return cap


def _usable(collector: PoolCollector) -> tuple[list[SamplePool], int]:
    pools = collector.settle()
    largest: defaultdict[str, int] = defaultdict(int)
    for pool in pools:
        largest[pool.prompt_key] = max(largest[pool.prompt_key], len(pool.samples))
    try:
        max_n = choose_max_n(list(largest.values()))
    except ConflictError as exc:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(collector.left_out.items()))
        left_out = f", of these left out: {counts}" if counts else ""
        message = f"{exc.message} ({collector.num_read} rollouts were read{left_out})"
        raise ConflictError(message, code=exc.code) from exc
    num_small = sum(len(pool.samples) for pool in pools if len(pool.samples) < max_n)
    if num_small:
        collector.left_out[f"of pools with fewer than {max_n} samples"] = num_small
    return [pool for pool in pools if len(pool.samples) >= max_n], max_n


async def _rewards_of(pool: SamplePool, reward: Scorer, key: str) -> list[float]:
    unknown = list(dict.fromkeys(sample.output for sample in pool.samples if key not in sample.rewards))
    inputs = [RewardInput(prompt=pool.prompt, output=output) for output in unknown]
    values: list[float] = []
    for begin in range(0, len(inputs), _CHUNK):  # in pieces, so that requests for this reward get between them
        values += await reward.score(inputs[begin : begin + _CHUNK])
    known = dict(zip(unknown, values, strict=True))
    return [sample.rewards[key] if key in sample.rewards else known[sample.output] for sample in pool.samples]
