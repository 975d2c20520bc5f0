"""Raw scores of the rewards that take part, output by output."""

import asyncio
from collections.abc import Sequence

from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.rewards.resolved import ResolvedReward


def parts_key(reward: ResolvedReward) -> str:
    """What raw scores depend on: name and version of each part. Not how they are combined."""
    return "\n".join(f"{part.name}@{part.version}" for part in reward.parts)


async def score_parts(reward: ResolvedReward, inputs: Sequence[RewardInput]) -> list[tuple[float, ...]]:
    """One row per input with one score per part. All parts score at the same time.

    Raises:
        RewardError: One score could not be computed; the other parts are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            columns = [tasks.create_task(part.score(inputs)) for part in reward.parts]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return list(zip(*(column.result() for column in columns), strict=True))
