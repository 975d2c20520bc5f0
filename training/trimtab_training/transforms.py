"""From rewards to what an objective is given: calibrated against rollouts of the base, then transformed (CTRL).

InfAlign, arXiv 2412.19792: the policy that is best under an inference-time procedure is that of ordinary KL-regularised
learning with a transform of the calibrated reward. The mathematics is `trimtab_adapters.infalign`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab_adapters.contract.calibration import EmpiricalCalibrator
from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.infalign.estimation_error import smoothed
from trimtab_adapters.infalign.optimal import solve_optimal
from trimtab_adapters.infalign.procedures import Procedure
from trimtab_adapters.infalign.transforms import Exponential, Identity, Logarithm, OneStep, Transform
from trimtab_training.transform_config import TransformConfig


def build_ctrl_transform(config: TransformConfig, *, kl_coef: float) -> Transform | None:
    """The function of the calibrated reward that `config` names; None for the reward itself.

    Args:
        config: Not of the kind `served`, which `served_transform` turns into another.
        kl_coef: The objective's weight of the KL, for `optimal` without a `beta` of its own.

    Raises:
        InvalidRequestError: `optimal` without a positive KL weight, or none could be computed for it.
    """
    if config.kind == "raw":
        return None
    if config.kind == "calibrated":
        return Identity()
    if config.kind == "log":
        return Logarithm()
    if config.kind == "exponential":
        return Exponential(config.t if config.t is not None else exponent(config.procedure, config.n or 1))
    if config.n is None:
        raise InvalidRequestError(f"the transform {config.kind!r} needs n")
    if config.kind == "one_step":
        return OneStep(config.procedure, config.n)
    beta = config.beta if config.beta is not None else kl_coef
    if beta <= 0:
        raise InvalidRequestError("the transform 'optimal' needs a KL weight above 0: set reward.transform.beta")
    try:
        return solve_optimal(Procedure(config.procedure, config.n), beta).transform
    except ArithmeticError as exc:
        raise InvalidRequestError(f"no optimal transform was found for beta = {beta}: {exc}") from exc


def exponent(procedure: str, n: int) -> float:
    """t of an exponential transform for a procedure: the slope of the one-step solution at the end that matters."""
    return float(2 * n - 1) if procedure == "best_of_n" else -float(2 * n - 1)


def fit_to_served(config: TransformConfig, *, best_of: int) -> TransformConfig:
    """`config` with the kind `served` replaced by what fits a route that serves the best of `best_of` samples."""
    if config.kind != "served":
        return config
    found = {"kind": "raw"} if best_of < 2 else {"kind": "one_step", "procedure": "best_of_n", "n": best_of}
    return TransformConfig.model_validate({**config.model_dump(exclude={"kind", "n"}, exclude_defaults=True), **found})


class RewardTransform:
    """Gives an objective its rewards.

    Args:
        transform: Of the calibrated reward; None gives the reward itself.
        calibrators: By prompt, for every prompt that is scored; unused without a transform.
    """

    def __init__(self, transform: Transform | None, calibrators: Mapping[str, EmpiricalCalibrator]) -> None:
        self._transform = transform
        self._calibrators = calibrators

    def knows(self, prompt: str) -> bool:
        """Whether rewards of this prompt's outputs can be transformed."""
        return self._transform is None or prompt in self._calibrators

    def __call__(self, prompts: Sequence[str], rewards: Sequence[float]) -> list[float]:
        """What takes the place of each reward.

        Raises:
            InvalidRequestError: A prompt has no reference rollouts.
        """
        if self._transform is None:
            return list(rewards)
        values = [self._calibrated(prompt, reward) for prompt, reward in zip(prompts, rewards, strict=True)]
        return [float(value) for value in self._transform(np.array(values, dtype=np.float64))]

    def _calibrated(self, prompt: str, reward: float) -> float:
        calibrator = self._calibrators.get(prompt)
        if calibrator is None:
            raise InvalidRequestError("a rollout's prompt has no reference rollouts, so its reward has no rank")
        value = calibrator.calibrate(reward)
        if isinstance(self._transform, Logarithm):  # an estimate can be 0 where the rank is not
            return float(smoothed(value, calibrator.size))
        return value
