"""Several registered rewards as one, under a name of their own or written out in a request."""

import hashlib
import json
import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import Combine, RewardMix, RewardSpec
from trimtab_server.rewards.resolved import AsyncReward, ResolvedReward


class CompositeOptions(BaseModel):
    """The `options` of a reward of kind `composite`. It has no limits: its parts have theirs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: Combine = "mean"
    """The weighted mean of the calibrated parts, the least of them, or their product."""
    weights: dict[str, float] = Field(min_length=1, max_length=16)
    """Weight of each part, by its name; positive. Only `mean` takes notice of how large they are."""


def parse_mix(spec: RewardSpec) -> RewardMix:
    """The mix that a reward of kind `composite` stands for. Raises `InvalidRequestError`."""
    if spec.target:
        raise InvalidRequestError("a reward of kind 'composite' has no target; leave it out", param="target")
    try:
        options = CompositeOptions.model_validate(spec.options, strict=True)
        return RewardMix(combine=options.combine, weights=options.weights)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        param = ".".join(("options", *(str(part) for part in first["loc"][:1])))
        raise InvalidRequestError(f"Invalid '{param}': {first['msg']}", param=param) from exc


def combine_parts(name: str, mix: RewardMix, parts: Sequence[AsyncReward]) -> ResolvedReward:
    """The mix of these parts, in the order of `mix.weights`. Its version changes when that of any part does."""
    if len(parts) == 1:
        # Calibrating it twice changes nothing.
        return ResolvedReward(name=name, version=parts[0].version, parts=(parts[0],))
    is_mean = mix.combine == "mean"
    total = math.fsum(mix.weights.values())
    weights = tuple(weight / total if is_mean else 1 / len(parts) for weight in mix.weights.values())
    versions = sorted((part.name, part.version, f"{weight:.12g}") for part, weight in zip(parts, weights, strict=True))
    digest = hashlib.sha256(json.dumps([mix.combine, versions]).encode())
    return ResolvedReward(
        name=name, version=digest.hexdigest()[:16], parts=tuple(parts), combine=mix.combine, weights=weights
    )
