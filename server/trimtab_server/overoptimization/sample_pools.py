"""Logged rollouts sorted into pools: independent samples of one policy for one prompt under one sampling setting."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trimtab_adapters.contract.calibration import prompt_key
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import ENDPOINT, IDENTITY, NUM_LEFT_OUT, SELECTION, ReferencePolicy

# Strategies that draw all candidates before they look at any, so that these are independent samples. Others stop when
# one is good, or stop the bad ones: what is left says more about the strategy than about the policy.
_UNBIASED = (None, "soft", "poisson")


@dataclass(frozen=True, slots=True)
class PooledSample:
    """One sample.

    Attributes:
        output: Its text.
        rewards: What the log knows of its raw rewards, by `name@version`.
    """

    output: str
    rewards: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SamplePool:
    """Independent samples of one policy for one prompt.

    Attributes:
        prompt_key: Of the prompt; pools of other sampling settings or steerings may share it.
        prompt: Its text.
        identity: What the engine told of the base behind the name; None where that was not known.
        samples: At least one.
    """

    prompt_key: str
    prompt: str
    identity: str | None
    samples: Sequence[PooledSample]


@dataclass(slots=True)
class PoolCollector:
    """Takes rollouts, oldest first.

    Attributes:
        base_model: Whose samples count.
        num_read: Rollouts seen.
        left_out: How many of them are in no pool, by reason.
    """

    base_model: str
    num_read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    _pools: dict[tuple[str, str], SamplePool] = field(default_factory=dict)
    _seeds: set[tuple[str, str, int]] = field(default_factory=set)
    _identity: str | None = None

    def add(self, rollout: Rollout) -> None:
        """Sort one in, or note why not."""
        self.num_read += 1
        reason = _unfit(rollout, self.base_model)
        if reason is not None or rollout.prompt is None:
            self.left_out[reason or "without the text of the prompt"] += 1
            return
        self._identity = rollout.metadata.get(IDENTITY)
        prompt, policy = prompt_key(rollout.prompt_token_ids, rollout.prompt), _policy_key(rollout)
        seed = rollout.sampling.get("seed")
        if seed is not None:
            if (prompt, policy, seed) in self._seeds:
                self.left_out["repeating a seed"] += 1
                return
            self._seeds.add((prompt, policy, seed))
        pool = self._pools.setdefault((prompt, policy), SamplePool(prompt, rollout.prompt, self._identity, []))
        rewards = {f"{value.name}@{value.version}": value.raw for value in rollout.rewards}
        assert isinstance(pool.samples, list)
        pool.samples.append(PooledSample(rollout.output_text, rewards))

    def settle(self) -> list[SamplePool]:
        """After the last rollout: the pools of the base that it came from, in the order in which each was begun.

        A name may have been given to another base meanwhile; what that one said is left out and counted.
        """
        pools = [pool for pool in self._pools.values() if pool.identity == self._identity]
        others = sum(len(pool.samples) for pool in self._pools.values() if pool.identity != self._identity)
        if others:
            self.left_out["of another base behind the same name, or of one not known"] = others
        return pools


def _unfit(rollout: Rollout, base_model: str) -> str | None:
    # Why a rollout is no independent sample of a policy of this base; None when it is one.
    if rollout.base_model != base_model:
        return "of another base model"
    if rollout.endpoint == "training":
        return "drawn for training"
    if not rollout.is_complete:
        return "stopped before their end"
    if rollout.metadata.get(NUM_LEFT_OUT):
        return "of requests in which a candidate failed"
    if "selection" in rollout.sampling or rollout.metadata.get(SELECTION) not in _UNBIASED:
        return "drawn until one was good enough, or rejected early, or put together from blocks"
    if rollout.sampling.get("temperature") == 0:
        return "of temperature 0"
    return None


def _policy_key(rollout: Rollout) -> str:
    # Reference rollouts and candidates of one request are samples of the same settings; their seeds apart.
    endpoint = rollout.metadata.get(ENDPOINT, rollout.endpoint) if rollout.endpoint == "reference" else rollout.endpoint
    identity = rollout.metadata.get(IDENTITY)
    policy = ReferencePolicy.of(rollout.base_model, endpoint, rollout.sampling, identity=identity)
    steering = [term.model_dump() for term in rollout.steering if term.alpha != 0]
    return json.dumps([steering, policy.key], sort_keys=True)
