"""What is good enough: the threshold of adaptive N."""

from trimtab_adapters.contract.selection import Adaptive
from trimtab_adapters.infalign.adaptive import threshold_for_price, threshold_for_win_rate
from trimtab_adapters.infalign.estimated_threshold import (
    estimated_threshold_for_price,
    estimated_threshold_for_win_rate,
)


def threshold_of(params: Adaptive, max_candidates: int, num_rollouts: int | None) -> float:
    """The calibrated reward at which drawing stops.

    Args:
        params: Of the request.
        max_candidates: N.
        num_rollouts: K, where calibrated rewards are estimated from so many rollouts of the prompt; None takes them as
            exact.

    Raises:
        ValueError: The target cannot be reached with so many candidates and rollouts.
    """
    if params.threshold is not None:
        return params.threshold
    if params.price is not None:
        if num_rollouts is None:
            return threshold_for_price(params.price, params.wave)
        return estimated_threshold_for_price(params.price, max_candidates, params.wave, num_rollouts)
    assert params.target is not None
    if num_rollouts is None:
        return threshold_for_win_rate(params.target, max_candidates, params.wave)
    return estimated_threshold_for_win_rate(params.target, max_candidates, params.wave, num_rollouts)
