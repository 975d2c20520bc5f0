"""The seam for rewards: what serving ranks by and training maximises."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One text to judge, with the prompt that it answers."""

    prompt: str
    output: str


@runtime_checkable
class RewardModel(Protocol):
    """Scores outputs. Larger is better; any scale, since calibration removes it.

    `version` changes whenever the same input could get another score: calibrators are bound to it.
    """

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order. Called from a worker thread, may block.

        Raises:
            RewardError: Any of them could not be computed.
        """
        ...


class RewardSpec(BaseModel):
    """How a reward is built, as the admin API and configuration write it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    kind: Literal["callable", "hf_classifier"]
    """`callable` (an entry point of the group `trimtab.rewards`) or `hf_classifier` (a local directory or hub id)."""
    target: str
    """Entry point name for `callable`; directory or hub id for `hf_classifier`."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
