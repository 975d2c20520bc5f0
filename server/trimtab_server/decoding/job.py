"""What one request asks to generate, and what came of it. No HTTP, no SQL."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trimtab_adapters.contract.params import AdapterWeight, Guidance, SteeringOperators, SteeringParams
from trimtab_server.decoding.candidates import Selection
from trimtab_server.engine.base import Candidate, Endpoint, EngineRequest
from trimtab_server.storage.base import ResolvedModel

_SEED_SPAN = 2**64


@dataclass(frozen=True, slots=True)
class PromptInput:
    """One prompt.

    Attributes:
        fields: What the engine gets: `{"prompt": ...}` or `{"messages": ...}`.
        text: The prompt as text, of a chat the texts of its messages, one per line; None where the caller sent ids.
    """

    fields: dict[str, Any]
    text: str | None


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """One request, validated and resolved.

    Attributes:
        id: Unique; the `id` of the answer.
        endpoint: The engine's route.
        resolved: Model and steering, pinned to exact versions.
        prompts: At least one.
        body: The engine's request body without prompt and seed, the same for all candidates.
        seed: Candidate i of every prompt gets seed + i, as in vLLM; None leaves it to the engine.
        n: Choices per prompt.
        num_candidates: Candidates per prompt, at least `n`.
        is_ranked: Whether choices are the best candidates, or simply all of them in order.
        reward: Name of the reward that ranks.
        calibration_size: Reference rollouts per prompt; None means the selector's default.
        record: Whether the engine shall record the steering.
        steering_logprobs: Whether the caller wants the recorded log-probabilities.
        guidance: The negative prompt of the steering as token ids, and its scale.
        num_alternatives: Alternatives per token of the explanation; None when none is asked for.
        metadata: For the rollouts.
    """

    id: str
    endpoint: Endpoint
    resolved: ResolvedModel
    prompts: tuple[PromptInput, ...]
    body: dict[str, Any]
    seed: int | None = None
    n: int = 1
    num_candidates: int = 1
    is_ranked: bool = False
    reward: str | None = None
    calibration_size: int | None = None
    record: bool = False
    steering_logprobs: bool = False
    guidance: Guidance | None = None
    num_alternatives: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def active_adapters(self) -> list[AdapterWeight]:
        """The adapters that change anything."""
        return [weight for weight in self.resolved.steering if weight.alpha != 0.0]

    @property
    def active_guidance(self) -> Guidance | None:
        """The guidance, when it changes anything."""
        return self.guidance if self.guidance is not None and self.guidance.scale != 1.0 else None

    @property
    def is_steered(self) -> bool:
        """Whether anything moves the base. Else the engine is asked for the plain base."""
        return bool(self.active_adapters) or self.active_guidance is not None

    @property
    def operators(self) -> SteeringOperators:
        """What is done with what the adapters and the guidance add; nothing without any of them."""
        return self.resolved.options.operators if self.is_steered else SteeringOperators()

    @property
    def explains(self) -> bool:
        """Whether the caller wants every token explained."""
        return self.num_alternatives is not None

    @property
    def num_choices(self) -> int:
        """Choices of the whole answer."""
        return len(self.prompts) * self.n

    def request(self, prompt_index: int, candidate_index: int) -> EngineRequest:
        """The engine's request for one candidate."""
        uid = f"{self.id}-{prompt_index}-{candidate_index}"
        body = {**self.body, **self.prompts[prompt_index].fields}
        if self.seed is not None:
            body["seed"] = (self.seed + candidate_index + _SEED_SPAN // 2) % _SEED_SPAN - _SEED_SPAN // 2
        return EngineRequest(self.endpoint, body, self.steering(uid), uid)

    def steering(self, uid: str) -> SteeringParams | None:
        """What the engine is told about one candidate's steering; None when there is nothing to do or to record."""
        if not (self.is_steered or self.explains):
            return None
        return SteeringParams(
            uid=uid,
            adapters=self.active_adapters,
            guidance=self.active_guidance,
            operators=self.operators,
            record=self.record,
            num_alternatives=self.num_alternatives,
        )

    def reference_request(self, prompt_index: int, draw_index: int) -> EngineRequest:
        """The engine's request for one unsteered rollout of the same prompt and sampling settings.

        Never seeded: a calibrator collects the draws of many requests, and they must be independent of each other.
        """
        uid = f"{self.id}-{prompt_index}-ref-{draw_index}"
        return EngineRequest(self.endpoint, {**self.body, **self.prompts[prompt_index].fields}, None, uid)


@dataclass(slots=True)
class PromptResult:
    """All candidates of one prompt, best first where they are ranked, and the reference rollouts drawn for it."""

    selections: list[Selection]
    references: list[Candidate] = field(default_factory=list)

    @property
    def candidates(self) -> list[Candidate]:
        """All candidates."""
        return [selection.candidate for selection in self.selections]


@dataclass(slots=True)
class JobResult:
    """What came of a job, one result per prompt, in order."""

    job: GenerationJob
    prompts: list[PromptResult]
    completed_at: float

    def choices(self) -> Iterator[tuple[int, Selection]]:
        """Index and selection of each choice: choice i of prompt p has the index p * n + i."""
        for prompt_index, prompt in enumerate(self.prompts):
            for i, selection in enumerate(prompt.selections[: self.job.n]):
                yield prompt_index * self.job.n + i, selection
