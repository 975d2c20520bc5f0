"""The seam for rewards: what serving ranks by and training maximises."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from trimtab_adapters.contract.errors import RewardError


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


@runtime_checkable
class AsyncRewardModel(Protocol):
    """A `RewardModel` that is awaited on the event loop: one that waits for something elsewhere.

    The version that `version` gives when `score` is called is the one that the scores are of. A model that is answered
    from another raises `RewardChangedError`, and gives the new version from then on.
    """

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order. Must not block; several calls may be under way at a time.

        Raises:
            RewardUnavailableError: None could be computed, but asking again may help.
            RewardError: Any of them could not be computed.
        """
        ...


Combine = Literal["mean", "min", "product"]
"""How several calibrated rewards become one: a trade-off, the worst of them, or all must hold."""


class RewardMix(BaseModel):
    """Several rewards as one. Each is calibrated, they are combined, and the combination is calibrated again.

    Calibration puts them on one scale, so that weights mean the same whatever the units of the rewards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: Combine = "mean"
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1)
    """Weight of each reward, by name; positive. `min` and `product` take no notice of them."""

    @property
    def name(self) -> str:
        """The mix written out; the same for the same mix, whatever the order or the sum of the weights."""
        total = math.fsum(self.weights.values())
        terms = [(name, weight / total) for name, weight in sorted(self.weights.items())]
        if self.combine == "mean":
            return "+".join(f"{weight:.6g}*{name}" for name, weight in terms)
        return f"{self.combine}({','.join(name for name, _ in terms)})"


RewardChoice = str | RewardMix
"""What a request's `reward` may be: the name of a registered reward, or a mix."""


RewardKind = Literal[
    "callable",
    "hf_classifier",
    "http",
    "keywords",
    "sentiment",
    "regex",
    "json_schema",
    "llm_judge",
    "composite",
]
"""What a registered reward is."""


class RewardSpec(BaseModel):
    """How a reward is built, as the admin API and configuration write it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    kind: RewardKind
    target: str = ""
    """What is scored with: an entry point's name for `callable`, a directory or hub id for `hf_classifier`, an URL for
    `http` and `llm_judge`, a regular expression for `regex`; empty for the other kinds."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """The kind's own, and limits on time, retries and size that all kinds have; `docs/rewards.md` lists them. For
    `callable` all others are keyword arguments."""


def check_scores(reward: str, scores: Sequence[object], num_inputs: int) -> list[float]:
    """Turn what a reward returned into plain floats, or refuse it.

    Args:
        reward: Name of the reward, for the message.
        scores: What it returned.
        num_inputs: How many inputs it was given.

    Raises:
        RewardError: Another number of scores than inputs, or one that is not a finite number. The message names the
            reward and the position, counted from 1, and never holds the text.
    """
    if len(scores) != num_inputs:
        raise RewardError(f"the reward {reward!r} returned {len(scores)} scores for {num_inputs} outputs")
    return [_finite(reward, score, i, num_inputs) for i, score in enumerate(scores, start=1)]


def _finite(reward: str, score: object, position: int, num_inputs: int) -> float:
    where = f"for output {position} of {num_inputs}"
    if not isinstance(score, Real):
        raise RewardError(f"the reward {reward!r} returned {type(score).__name__} instead of a number {where}")
    try:
        value = float(score)
    except OverflowError as exc:
        raise RewardError(f"the reward {reward!r} returned a number out of range {where}") from exc
    if not math.isfinite(value):
        raise RewardError(f"the reward {reward!r} returned {value} {where}; a reward must be finite")
    return value
