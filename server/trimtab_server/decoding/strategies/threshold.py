"""What is good enough: the threshold of adaptive N."""

from trimtab_adapters.contract.selection import Adaptive
from trimtab_adapters.infalign.adaptive import threshold_for_price, threshold_for_win_rate


def threshold_of(params: Adaptive, max_candidates: int) -> float:
    """The calibrated reward at which drawing stops.

    Raises:
        ValueError: The target cannot be reached with so many candidates.
    """
    if params.threshold is not None:
        return params.threshold
    if params.price is not None:
        return threshold_for_price(params.price, params.wave)
    assert params.target is not None
    return threshold_for_win_rate(params.target, max_candidates, params.wave)
