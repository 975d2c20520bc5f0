"""The exact tilt at request time: draw from the reference policy and accept with probability e^{(Φ(C) - Φ(1))/β}.

What is accepted has the tilted policy's distribution, without the bias of a choice among n, given a correct C.
"""

import math

import numpy as np

from trimtab_adapters.infalign.tilted import TiltedPolicy
from trimtab_adapters.infalign.unit_interval import FloatArray


def acceptance_probability(policy: TiltedPolicy, calibrated: FloatArray) -> FloatArray:
    """Probability that a draw with this calibrated reward is accepted, of the shape of `calibrated`; 1 at C = 1."""
    top = policy.transform(np.ones(1))[0]
    return np.asarray(np.exp((policy.transform(calibrated) - top) / policy.beta))


def expected_draws(policy: TiltedPolicy) -> float:
    """Mean number of draws until one is accepted, e^{Φ(1)/β} / Z: the largest density ratio."""
    return math.exp(float(policy.log_density(np.ones(1))[0]))
