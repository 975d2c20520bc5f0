"""Where fresh rollouts come from: the engine behind the gateway, or the two models in this process."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from trimtab_adapters.contract.errors import EngineError, InvalidRequestError
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_training.config import SamplingConfig
from trimtab_training.gateway import Completion, GatewayClient
from trimtab_training.interruption import Interruption
from trimtab_training.models import Vocabulary
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.sampler import TokenMask, sample_outputs

_USABLE_FINISH_REASONS = ("stop", "length")

NO_OPERATORS: dict[str, Any] = {"schedule": None, "plausibility": None, "max_kl": None, "negative_prompt": None}
"""In the request field `steering`: none of those that a route may have."""

_NOTHING_ELSE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What would otherwise be the base model's own defaults, which may cut and bend the distribution."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One output, with what a reward reads and what the models see.

    Attributes:
        steered_logprobs: Of each output token under the policy that drew it, before temperature; None where unknown.
        base_logprobs: Likewise under the base.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...]
    output: str
    output_token_ids: tuple[int, ...]
    steered_logprobs: tuple[float, ...] | None = None
    base_logprobs: tuple[float, ...] | None = None

    @property
    def reward_input(self) -> RewardInput:
        """What a reward judges."""
        return RewardInput(prompt=self.prompt, output=self.output)


class RolloutSource(Protocol):
    """Draws outputs from the base or from the policy as it is now."""

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        num_per_prompt: int,
        seed: int,
        steered: bool,
        on_done: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """Draw outputs.

        Args:
            prompts: What to answer.
            num_per_prompt: Outputs per prompt.
            seed: The same seed, prompts and policy give the same outputs.
            steered: From the tailored policy under its best control token; otherwise from the base alone.
            on_done: Called after each prompt.

        Returns:
            For each prompt its outputs, in the order of `prompts`.
        """
        ...


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """A registered adapter version and the weight to draw with."""

    name: str
    version: VersionId
    alpha: float

    @property
    def steering(self) -> dict[str, Any]:
        """The request field `steering`."""
        return {"adapters": [{"name": self.name, "version": self.version, "alpha": self.alpha}], **NO_OPERATORS}


class GatewaySource:
    """Draws through the gateway, so from the engine that serves.

    Args:
        gateway: The connection.
        model: Model name in the requests: the base model or a route. Its own steering is overridden in every request.
        sampling: How to sample.
        current_version: Publishes the policy as it is now for as long as the context lasts.
        with_logprobs: Whether the engine's log-probabilities come with each sample.
    """

    def __init__(
        self,
        gateway: GatewayClient,
        *,
        model: str,
        sampling: SamplingConfig,
        current_version: Callable[[], AbstractContextManager[NamedVersion]],
        with_logprobs: bool = False,
    ) -> None:
        self._gateway = gateway
        self._with_logprobs = with_logprobs
        self._model = model
        self._sampling = sampling
        self._current_version = current_version

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        num_per_prompt: int,
        seed: int,
        steered: bool,
        on_done: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """See `RolloutSource`."""
        if not steered:
            return self._draw(prompts, num_per_prompt, seed, {"adapters": [], **NO_OPERATORS}, on_done)
        with self._current_version() as version:
            return self._draw(prompts, num_per_prompt, seed, version.steering, on_done)

    def _draw(
        self,
        prompts: Sequence[Prompt],
        num_per_prompt: int,
        seed: int,
        steering: dict[str, Any],
        on_done: Callable[[], None] | None,
    ) -> list[list[Sample]]:
        sampling = self._sampling
        body: dict[str, Any] = {
            "model": self._model,
            "n": num_per_prompt,
            "best_of": num_per_prompt,  # a route's own best_of would hand out the best instead of fair samples
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **_NOTHING_ELSE,
            "steering": steering,
        }
        body |= {"steering_logprobs": True} if self._with_logprobs else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        body |= {"stop_token_ids": list(sampling.stop_token_ids)} if sampling.stop_token_ids else {}
        # The gateway gives candidate i of a request the seed + i, so requests are this far apart.
        bodies = [
            {
                **body,
                "prompt": prompt.text if prompt.token_ids is None else list(prompt.token_ids),
                "seed": seed + index * num_per_prompt,
            }
            for index, prompt in enumerate(prompts)
        ]
        answers = self._gateway.complete(bodies, on_done=on_done)
        return [
            [_sample_of(prompt, completion) for completion in completions]
            for prompt, completions in zip(prompts, answers, strict=True)
        ]


def _sample_of(prompt: Prompt, completion: Completion) -> Sample:
    if completion.finish_reason not in _USABLE_FINISH_REASONS:
        raise EngineError(f"a rollout ended with finish_reason {completion.finish_reason!r} instead of stop or length")
    return Sample(
        prompt=prompt.text,
        prompt_token_ids=tuple(completion.prompt_token_ids),
        output=completion.text,
        output_token_ids=tuple(completion.token_ids),
        steered_logprobs=completion.steered_logprobs,
        base_logprobs=completion.base_logprobs,
    )


class LocalSource:
    """Draws from the two models in this process.

    Args:
        policy: Both models.
        adapter_prefix: What the adapter sees before each prompt: the best control token and the fixed prefix.
        vocabulary: Encodes prompts and decodes outputs.
        sampling: How to sample; `stop` texts are not supported here.
        end_token_ids: The base model's own; `sampling.stop_token_ids` are added.
        batch_size: Prompts per static batch.
        interruption: Ends sampling early.
    """

    def __init__(
        self,
        policy: TailoredPolicy,
        *,
        adapter_prefix: Sequence[int],
        vocabulary: Vocabulary,
        sampling: SamplingConfig,
        end_token_ids: frozenset[int],
        batch_size: int = 64,
        interruption: Interruption | None = None,
    ) -> None:
        self._policy = policy
        self._adapter_prefix = tuple(adapter_prefix)
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._end_token_ids = end_token_ids | frozenset(sampling.stop_token_ids)
        self._batch_size = batch_size
        self._interruption = interruption
        self._mask: TokenMask | None = None

    def under(self, mask: TokenMask) -> Self:
        """The same source, but what it draws from the tailored policy is drawn under a mask."""
        masked = copy.copy(self)
        masked._mask = mask
        return masked

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        num_per_prompt: int,
        seed: int,
        steered: bool,
        on_done: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """See `RolloutSource`."""
        generator = torch.Generator().manual_seed(seed)
        contexts = [self._token_ids(prompt) for prompt in prompts]
        rows = [index for index in range(len(prompts)) for _ in range(num_per_prompt)]
        drawn: list[list[Sample]] = [[] for _ in prompts]
        # Prompts of like length share a batch: less padding. Stable, so the result depends on the seed alone.
        rows.sort(key=lambda index: len(contexts[index]))
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            outputs = sample_outputs(
                self._policy,
                [contexts[index] for index in batch],
                self._adapter_prefix if steered else None,
                max_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                end_token_ids=self._end_token_ids,
                generator=generator,
                mask=self._mask if steered else None,
                interruption=self._interruption,
            )
            for index, output in zip(batch, outputs, strict=True):
                drawn[index].append(
                    Sample(
                        prompts[index].text,
                        contexts[index],
                        self._vocabulary.decode(list(output.token_ids)),
                        output.token_ids,
                        output.steered_logprobs,
                        output.base_logprobs,
                    )
                )
                if on_done is not None and len(drawn[index]) == num_per_prompt:
                    on_done()
        return drawn

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        token_ids = prompt.token_ids if prompt.token_ids is not None else tuple(self._vocabulary.encode(prompt.text))
        if not token_ids:
            raise InvalidRequestError(f"the prompt {prompt.text!r} has no tokens")
        if not self._policy.fits(len(self._adapter_prefix), len(token_ids), self._sampling.max_tokens):
            raise InvalidRequestError(
                f"the models' positions do not allow a prompt of {len(token_ids)} tokens and "
                f"{self._sampling.max_tokens} new ones; lower sampling.max_tokens or leave the prompt out"
            )
        return token_ids
