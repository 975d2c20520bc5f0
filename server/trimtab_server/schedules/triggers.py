"""When a schedule posts its job."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Trigger(BaseModel):
    """A part of a schedule; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Every(Trigger):
    """After so many rollouts, or so much time."""

    new_rollouts: int | None = Field(default=None, ge=1, le=10**9)
    """Usable rollouts of the route since the last job ended."""
    hours: float | None = Field(default=None, gt=0, le=24 * 366)
    """Since the last job was posted."""

    @model_validator(mode="after")
    def _says_when(self) -> Self:
        if (self.new_rollouts is None) == (self.hours is None):
            raise ValueError("give either new_rollouts or hours")
        return self


class Drift(Trigger):
    """When the mean reward of the route's newest requests is below that of the first after the last job.

    Requests are cut into windows one after the other. Each window but the first is compared with the first, once, by a
    one-sided Welch test (see `drift`); so while nothing changes, a window raises an alarm with the odds `false_alarm`.
    """

    reward: Annotated[str, Field(min_length=1, max_length=64)]
    """Name of a reward that the route's rollouts are logged with."""
    window: int = Field(default=200, ge=30, le=100_000)
    """Requests per window."""
    false_alarm: float = Field(default=0.001, gt=0, le=0.5)
    """Odds that a window raises an alarm although nothing changed."""


class Triggers(Trigger):
    """When a schedule posts its job: when one of these says so and its last job has ended."""

    route: str | None = Field(default=None, min_length=1, max_length=64)
    """Whose rollouts are watched."""
    every: Every | None = None
    """Regular training."""
    drift: Drift | None = None
    """Training when it is needed."""

    @model_validator(mode="after")
    def _can_act(self) -> Self:
        if self.every is None and self.drift is None:
            raise ValueError("a schedule needs every, drift or both")
        watches = self.drift is not None or (self.every is not None and self.every.new_rollouts is not None)
        if watches and self.route is None:
            raise ValueError("new_rollouts and drift need the route whose rollouts are watched")
        return self
