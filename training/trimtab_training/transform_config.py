"""Which transform of the reward an objective is given: with it, any objective becomes InfAlign's CTRL."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab_adapters.infalign.transforms import MAX_EXPONENT
from trimtab_training.config_section import ConfigSection

ServedProcedure = Literal["best_of_n", "worst_of_n"]


class TransformConfig(ConfigSection):
    """The transform, and the reference rollouts that calibrate the reward where it needs that."""

    kind: Literal["served", "raw", "calibrated", "log", "exponential", "one_step", "optimal"] = "served"
    """`served` fits the procedure of the route that is published to: `one_step` for its best-of-N, `raw` where there is
    no route or it serves one sample. `raw` is the reward itself; all others are functions of the calibrated reward."""
    procedure: ServedProcedure = "best_of_n"
    """What the policy is to be good under: `exponential` without `t`, `one_step` and `optimal` are made for it."""
    n: int | None = Field(default=None, ge=2, le=1024)
    """Samples of the procedure."""
    t: float | None = Field(default=None, ge=-MAX_EXPONENT, le=MAX_EXPONENT)
    """Exponent of `exponential`; left out it is 2n - 1 for best-of-n and -(2n - 1) for worst-of-n."""
    beta: float | None = Field(default=None, gt=0)
    """KL weight that `optimal` is optimal for; left out, the objective's own."""
    num_reference: int = Field(default=32, ge=1, le=4096)
    """Rollouts of the base per training prompt that calibrate the reward. For exponential transforms take 100."""
    reference_from_log: bool = True
    """Whether the gateway's log is searched for such rollouts before they are drawn; only where the gateway draws."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.kind in ("one_step", "optimal") and self.n is None:
            raise ValueError(f"the transform {self.kind!r} needs n, the samples of the procedure")
        if self.kind == "exponential" and (self.n is None) == (self.t is None):
            raise ValueError("the transform 'exponential' needs either t or n")
        if self.t is not None and (self.kind != "exponential" or self.t == 0):
            raise ValueError("t belongs to the transform 'exponential' and is not 0")
        if self.beta is not None and self.kind != "optimal":
            raise ValueError("beta belongs to the transform 'optimal'")
        return self
