import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_training.transform_config import TransformConfig
from trimtab_training.transforms import RewardTransform, build_ctrl_transform, fit_to_served

SCORES = EmpiricalCalibrator.fit([0.0, 1.0, 2.0, 3.0], reference="base", reward="r")


def values(config: TransformConfig, *rewards: float, kl_coef: float = 0.0) -> list[float]:
    transform = RewardTransform(build_ctrl_transform(config, kl_coef=kl_coef), {"p": SCORES})
    return transform(["p"] * len(rewards), rewards)


# Of the four reference rewards, 0.5 is above one and 2.0 above two and a half: ranks 1/4 and 5/8.
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "raw"}, [0.5, 2.0]),
        ({"kind": "calibrated"}, [0.25, 0.625]),
        ({"kind": "log"}, [math.log((4 * 0.25 + 0.5) / 5), math.log((4 * 0.625 + 0.5) / 5)]),
        ({"kind": "one_step", "n": 2}, [0.25**3, 0.625**3]),
        ({"kind": "one_step", "n": 2, "procedure": "worst_of_n"}, [1 - 0.75**3, 1 - 0.375**3]),
        ({"kind": "exponential", "t": 3}, [(math.exp(3 * u) - 1) / (math.exp(3) - 1) for u in (0.25, 0.625)]),
        ({"kind": "exponential", "n": 2}, [(math.exp(3 * u) - 1) / (math.exp(3) - 1) for u in (0.25, 0.625)]),
        (
            {"kind": "exponential", "n": 2, "procedure": "worst_of_n"},
            [(1 - math.exp(-3 * u)) / (1 - math.exp(-3)) for u in (0.25, 0.625)],
        ),
    ],
)
def test_a_transform_is_applied_to_the_rank_among_the_bases_outputs(config: Any, expected: list[float]) -> None:
    assert values(TransformConfig(**config), 0.5, 2.0) == pytest.approx(expected)


def test_a_rank_of_zero_has_a_finite_logarithm() -> None:
    assert values(TransformConfig(kind="log"), -1.0) == pytest.approx([math.log(0.1)])


def test_the_optimal_transform_takes_the_objectives_kl_weight_unless_it_has_its_own() -> None:
    own = TransformConfig(kind="optimal", n=4, beta=0.5)
    assert values(own, 0.5, 2.0, kl_coef=9.0) == values(own, 0.5, 2.0, kl_coef=0.0)
    lent = TransformConfig(kind="optimal", n=4)
    assert values(lent, 0.5, 2.0, kl_coef=0.5) == values(own, 0.5, 2.0)
    with pytest.raises(InvalidRequestError, match="beta"):
        build_ctrl_transform(lent, kl_coef=0.0)


def test_the_optimal_transform_of_a_large_beta_is_the_one_step_form() -> None:
    grid = np.linspace(0, 1, 11)
    optimal = build_ctrl_transform(TransformConfig(kind="optimal", n=4, beta=1e4), kl_coef=0)
    one_step = build_ctrl_transform(TransformConfig(kind="one_step", n=4), kl_coef=0)
    assert optimal is not None
    assert one_step is not None
    assert optimal(grid) / optimal(np.array([1.0])) == pytest.approx(one_step(grid), abs=1e-3)


def test_what_is_served_decides_unless_the_configuration_does() -> None:
    served = TransformConfig(num_reference=64)
    assert fit_to_served(served, best_of=1).kind == "raw"
    fitted = fit_to_served(served, best_of=4)
    assert (fitted.kind, fitted.procedure, fitted.n, fitted.num_reference) == ("one_step", "best_of_n", 4, 64)
    named = TransformConfig(kind="calibrated")
    assert fit_to_served(named, best_of=4) is named


def test_a_prompt_without_reference_rollouts_is_refused() -> None:
    transform = RewardTransform(build_ctrl_transform(TransformConfig(kind="calibrated"), kl_coef=0), {"p": SCORES})
    assert (transform.knows("p"), transform.knows("q")) == (True, False)
    with pytest.raises(InvalidRequestError, match="reference"):
        transform(["q"], [1.0])
    assert RewardTransform(None, {}).knows("q")


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "one_step"},
        {"kind": "optimal"},
        {"kind": "exponential"},
        {"kind": "exponential", "n": 2, "t": 3.0},
        {"kind": "exponential", "t": 0.0},
        {"kind": "calibrated", "t": 3.0},
        {"kind": "one_step", "n": 2, "beta": 1.0},
        {"kind": "cubic"},
    ],
)
def test_a_transform_that_lacks_something_or_has_too_much_is_refused(config: Any) -> None:
    with pytest.raises(ValidationError):
        TransformConfig(**config)
