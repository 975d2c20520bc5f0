"""A reward held to the version that a request began with."""

from collections.abc import Sequence

from trimtab_adapters.contract.errors import RewardChangedError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.rewards.batching import BatchedReward


class PinnedReward:
    """An `AsyncReward` whose scores are all of one version, over all of its calls.

    Args:
        reward: Its version may change between calls.
    """

    def __init__(self, reward: BatchedReward) -> None:
        self._reward = reward
        self._version = reward.version

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._reward.name

    @property
    def version(self) -> str:
        """The one at the time of pinning."""
        return self._version

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order.

        Raises:
            RewardChangedError: The reward has another version by now.
            RewardError: One of them could not be computed, or not in time.
        """
        scored = await self._reward.scored(inputs)
        if scored.version != self._version:
            raise RewardChangedError(
                f"the reward {self.name!r} changed from version {self._version} to {scored.version} during this "
                "request; ask again"
            )
        return scored.scores
