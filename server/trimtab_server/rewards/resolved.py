"""What a request's or route's `reward` means: one reward, or several that are combined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab_adapters.contract.rewards import Combine, RewardInput


class AsyncReward(Protocol):
    """A reward on the request path: behind its queue, with its limits on time and retries."""

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order.

        Raises:
            RewardError: One of them could not be computed, or not in time. A missing reward is never 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class ResolvedReward:
    """One version of each reward that takes part, so that everything about one request is scored alike.

    Attributes:
        name: Of the reward, or the mix written out, such as `0.7*helpful+0.3*harmless`.
        version: Changes whenever scores could change.
        parts: One reward, or those that are combined.
        combine: How; None for a single reward.
        weights: One per part, summing to 1; of use for `mean` only.
    """

    name: str
    version: str
    parts: tuple[AsyncReward, ...]
    combine: Combine | None = None
    weights: tuple[float, ...] = (1.0,)
