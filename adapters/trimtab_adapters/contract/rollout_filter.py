"""Which logged rollouts are meant: the conditions of an export, of a page of the log and of a training run.

`select_rollouts` is their definition. The database answers the same question in SQL, and a test compares the two.
"""

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab_adapters.contract.feedback import Rating
from trimtab_adapters.contract.records import Rollout, RolloutEndpoint

FilterText = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]+$")]


class RolloutConditions(BaseModel):
    """What a rollout must be; a condition left out means any. All that are given must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    route: FilterText | None = None
    """Only rollouts of this route."""
    base_model: FilterText | None = None
    """Only rollouts of the base model of this public name."""
    adapter: FilterText | None = None
    """Only rollouts steered by this adapter."""
    version: FilterText | None = None
    """Only rollouts steered by this adapter version."""
    steered: bool | None = None
    """Only rollouts that an adapter of a weight other than 0 steered, or only those that none did."""
    endpoint: RolloutEndpoint | None = None
    """Only rollouts of this endpoint."""
    request_id: FilterText | None = None
    """Only rollouts of the request whose answer has this id."""
    since: float | None = None
    """Only rollouts completed at or after this Unix time."""
    until: float | None = None
    """Only rollouts completed before this Unix time."""
    chosen_only: bool = False
    """Only candidates that were returned."""
    has_feedback: bool | None = None
    """Only rollouts on which there is feedback, or only those without."""
    min_rating: Rating | None = None
    """Only rollouts whose ratings have at least this mean."""
    max_rating: Rating | None = None
    """Only rollouts whose ratings have at most this mean."""
    reward: FilterText | None = None
    """Only rollouts that were scored by this reward, whatever its version."""
    min_reward: float | None = None
    """Only rollouts to which `reward` gave at least this much, before calibration."""
    max_reward: float | None = None
    """Only rollouts to which `reward` gave at most this much, before calibration."""
    min_calibrated: float | None = Field(default=None, ge=0, le=1)
    """Only rollouts to which `reward` gave at least this calibrated value."""
    max_calibrated: float | None = Field(default=None, ge=0, le=1)
    """Only rollouts to which `reward` gave at most this calibrated value."""
    whole_requests: bool = False
    """Conditions on feedback and reward choose requests: of one in which a rollout meets all conditions, all those are
    read that meet the others. What was drawn together stays together, whatever came of it."""

    @model_validator(mode="after")
    def _names_the_reward(self) -> Self:
        bounds = (self.min_reward, self.max_reward, self.min_calibrated, self.max_calibrated)
        if self.reward is None and any(bound is not None for bound in bounds):
            raise ValueError("bounds on a reward need `reward`, its name")
        return self

    @property
    def asks_for_outcome(self) -> bool:
        """Whether feedback or a reward decides."""
        bounds = (self.has_feedback, self.min_rating, self.max_rating, self.reward)
        return any(bound is not None for bound in bounds)

    def matches_origin(self, rollout: Rollout) -> bool:
        """Whether the conditions hold that are not on feedback or reward."""
        terms = [
            term
            for term in rollout.steering
            if self.adapter in (None, term.name) and self.version in (None, term.version)
        ]
        is_steered = any(term.alpha != 0.0 for term in rollout.steering)
        return (
            self.route in (None, rollout.route)
            and self.base_model in (None, rollout.base_model)
            and (bool(terms) or (self.adapter is None and self.version is None))
            and self.steered in (None, is_steered)
            and self.endpoint in (None, rollout.endpoint)
            and self.request_id in (None, rollout.request_id)
            and _is_within(rollout.created_at, self.since, None)
            and (self.until is None or rollout.created_at < self.until)
            and (rollout.chosen or not self.chosen_only)
        )

    def matches_outcome(self, rollout: Rollout) -> bool:
        """Whether the conditions on feedback and reward hold."""
        return (
            self.has_feedback in (None, bool(rollout.feedback))
            and _is_within(rollout.rating, self.min_rating, self.max_rating)
            and (
                self.reward is None
                or any(
                    value.name == self.reward
                    and _is_within(value.raw, self.min_reward, self.max_reward)
                    and _is_within(value.calibrated, self.min_calibrated, self.max_calibrated)
                    for value in rollout.rewards
                )
            )
        )


class RolloutFilter(RolloutConditions):
    """Conditions, and how many rollouts are wanted."""

    limit: int | None = Field(default=None, ge=0, lt=2**63)
    """Most rollouts, oldest first."""


def select_rollouts(rollouts: Iterable[Rollout], where: RolloutFilter) -> list[Rollout]:
    """The rollouts that are meant, in their order; what the database answers to the same filter."""
    found = [rollout for rollout in rollouts if where.matches_origin(rollout)]
    if where.asks_for_outcome:
        wanted = {rollout.request_id for rollout in found if where.matches_outcome(rollout)}
        found = [r for r in found if (r.request_id in wanted if where.whole_requests else where.matches_outcome(r))]
    return found[: where.limit]


def _is_within(value: float | None, low: float | None, high: float | None) -> bool:
    """Whether a value lies in a range that includes its ends; one that is missing lies in the unbounded one only."""
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)
