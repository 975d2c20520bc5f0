"""Drawing samples through the gateway: one request each, every one with a seed of its own."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_adapters.contract.errors import ConflictError, EngineError
from trimtab_training.config import SamplingConfig
from trimtab_training.evaluation.policies import Policy
from trimtab_training.evaluation.procedures import Served
from trimtab_training.evaluation.prompt_file import Prompt
from trimtab_training.evaluation.sample_cache import Sample, SampleCache
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption

USER = "trimtab-evaluate"
"""Field `user` of the requests, so that the rollouts they leave in the gateway's log can be told apart."""

_FINISH_REASONS = ("stop", "length")
_LOG_PROBABILITIES = ("base", "steered", "kl")

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Draws:
    """The samples of one policy, plain or as the gateway chose them: `[prompts][samples]`."""

    samples: tuple[tuple[Sample, ...], ...]

    @property
    def num_tokens(self) -> Floats:
        """Generated tokens, `[prompts, samples]`."""
        return self._array(lambda sample: sample.num_tokens)

    @property
    def log_ratios(self) -> Floats:
        """log steered - log base of each output, `[prompts, samples]`."""
        return self._array(lambda sample: sample.log_ratio)

    @property
    def token_kls(self) -> Floats:
        """Sum of KL(steered || base) over the tokens of each output, `[prompts, samples]`."""
        return self._array(lambda sample: sample.token_kl)

    def _array(self, read: Callable[[Sample], float]) -> Floats:
        return np.array([[read(sample) for sample in row] for row in self.samples], dtype=np.float64)


class Drawer:
    """Draws samples of one run.

    Args:
        gateway: Asked, at most `gateway.concurrency` requests at a time.
        prompts: All prompts of the run.
        num_samples: Per prompt and policy.
        sampling: How outputs are sampled.
        seed: Of the run.
        common_seeds: Whether sample i of a prompt has the same seed whatever draws it.
        cache: Samples that are there already, and where new ones go.
        interruption: Ends drawing early, with what was drawn in the cache.
    """

    def __init__(
        self,
        gateway: GatewayClient,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        sampling: SamplingConfig,
        seed: int,
        common_seeds: bool,
        cache: SampleCache,
        interruption: Interruption,
    ) -> None:
        self._gateway = gateway
        self._prompts = prompts
        self._num_samples = num_samples
        self._sampling = sampling
        self._seed = seed
        self._common_seeds = common_seeds
        self._cache = cache
        self._interruption = interruption

    def draw(
        self, policy: Policy, served: Served | None, *, reward: str, reward_version: str, on_done: Callable[[], None]
    ) -> Draws:
        """All samples of a policy, in the order of the prompts.

        Args:
            policy: Drawn from.
            served: What the gateway shall do with its own candidates; None draws plain samples.
            reward: Ranks those candidates.
            reward_version: Its version now; chosen samples are only good for this one.
            on_done: Called after each sample, from any thread.

        Raises:
            ConflictError: What the policy stands for changed meanwhile.
            TrainingInterrupted: A stop was asked for.
            TrimtabError: The gateway refused or broke off; nothing is left out.
        """
        procedure = {} if served is None else {**served.body(reward), "reward_version": reward_version}
        common = {**policy.body, **self._sampling_fields(), "n": 1, "steering_logprobs": True, "user": USER}
        common |= {"best_of": 1} if served is None else served.body(reward)

        def one(prompt: Prompt, index: int) -> Sample:
            self._interruption.check()
            seed = self._sample_seed(policy, served, prompt, index)
            key = _digest(policy.identity, procedure, self._sampling.model_dump(mode="json"), prompt.fields, seed)
            sample = self._cache.get(key)
            if sample is None:
                answer = self._gateway.ask("POST", prompt.path, {**prompt.body, **common, "seed": seed})
                _check_steering(policy, answer)
                sample = _sample(answer)
                self._cache.put(key, sample)
            on_done()
            return sample

        with ThreadPoolExecutor(max_workers=self._gateway.concurrency, thread_name_prefix="draw") as pool:
            futures = [[pool.submit(one, prompt, i) for i in range(self._num_samples)] for prompt in self._prompts]
            try:
                done, _ = wait([future for row in futures for future in row], return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises the first error while others still run
                return Draws(tuple(tuple(future.result() for future in row) for row in futures))
            finally:  # after an error or a stop the rest must not be sent
                pool.shutdown(wait=False, cancel_futures=True)

    def _sampling_fields(self) -> dict[str, Any]:
        sampling = self._sampling
        fields: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        lists = {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
        return fields | {name: values for name, values in lists.items() if values}

    def _sample_seed(self, policy: Policy, served: Served | None, prompt: Prompt, index: int) -> int:
        """63 bits of a hash: the same for the same arguments, else independent."""
        who = [] if self._common_seeds else [policy.name, None if served is None else served.label]
        return int(_digest(self._seed, who, prompt.fields, index)[:16], 16) >> 1


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_steering(policy: Policy, answer: Mapping[str, Any]) -> None:
    if answer.get("steering") != policy.steering:
        raise ConflictError(
            f"what {policy.model!r} stands for changed during the evaluation: it was steered by {policy.steering} and "
            f"now is by {answer.get('steering')}; name exact versions, or evaluate when nobody switches routes"
        )


def _sample(answer: Mapping[str, Any]) -> Sample:
    try:
        (choice,) = answer["choices"]
        output = choice["text"] if "text" in choice else choice["message"]["content"]
        recorded = choice["steering_logprobs"]
        num_tokens = len(recorded["token_ids"])
        base, steered, kl = ([float(value) for value in recorded[name]] for name in _LOG_PROBABILITIES)
        finish_reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"the gateway's answer lacks what an evaluation needs ({type(exc).__name__}: {exc})") from exc
    if not isinstance(output, str) or finish_reason not in _FINISH_REASONS:
        raise EngineError(f"an answer ended with {finish_reason!r}, which is no whole text")
    if {len(base), len(steered), len(kl)} != {num_tokens} or not all(map(math.isfinite, (*base, *steered, *kl))):
        raise EngineError("the gateway's record of an answer does not have three finite numbers for every token")
    log_ratio = math.fsum(steered) - math.fsum(base)
    return Sample(output, num_tokens, log_ratio, math.fsum(kl), str(finish_reason))
