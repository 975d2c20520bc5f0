"""Which logged rollouts a run learns from, and where they are read."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from trimtab_adapters.contract.rollout_filter import RolloutConditions, RolloutFilter
from trimtab_training.config_section import ConfigSection


class LoggedConfig(RolloutConditions, ConfigSection):
    """Which logged rollouts are learned from before the first step; a condition left out means any.

    All candidates of a request are learned from or none, because those that were chosen are no fair sample of the
    policy that drew them. So `chosen_only` leaves requests all of whose candidates were returned.
    """

    enabled: bool = True
    """Whether logged rollouts are read at all."""
    path: tuple[Path, ...] = ()
    """Files that `trimtab rollouts export` wrote, `.jsonl` or `.parquet`; left out, the gateway's log is read."""
    limit: int | None = Field(default=None, ge=1)
    """Most rollouts to read, oldest first."""
    with_operators: bool = False
    """Whether also rollouts that were steered with operators or a negative prompt, which the policy that is trained
    does not have, enter the pool."""
    whole_requests: bool = True
    """Conditions on feedback and reward choose requests, of which then all candidates are read."""

    @model_validator(mode="before")
    @classmethod
    def _one_path(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("path"), str | Path):
            return {**data, "path": (data["path"],)}
        return data

    @model_validator(mode="after")
    def _knows_the_files(self) -> Self:
        for path in self.path:
            if path.suffix not in (".jsonl", ".parquet"):
                raise ValueError(f"logged.path: {path} is neither .jsonl nor .parquet")
        return self

    @property
    def where(self) -> RolloutFilter:
        """The conditions and the limit."""
        return RolloutFilter(**self.model_dump(include=set(RolloutFilter.model_fields)))
