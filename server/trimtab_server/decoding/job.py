"""What one request asks to generate, and what came of it. No HTTP, no SQL."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trimtab_adapters.contract.params import AdapterWeight, Guidance, SteeringOperators, SteeringParams
from trimtab_adapters.contract.rewards import RewardChoice
from trimtab_adapters.contract.selection import SelectionRequest
from trimtab_server.decoding.candidates import LeftOut, Selection
from trimtab_server.decoding.scoring import CalibrationChoice
from trimtab_server.engine.base import Candidate, Endpoint, EngineRequest
from trimtab_server.storage.base import ResolvedModel

_SEED_SPAN = 2**64

PIECE_FIELDS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids"),
        *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
        *("skip_special_tokens", "spaces_between_special_tokens", "return_tokens_as_token_ids"),
        *("priority", "cache_salt", "session_id", "vllm_xargs", "watermarking"),
    }
)
"""Fields of the engine's body that mean the same for a continuation as for the whole answer."""

CHAT_RENDERING = frozenset(
    {
        *("chat_template", "chat_template_kwargs", "add_special_tokens"),
        *("add_generation_prompt", "continue_final_message"),
    }
)
"""Fields of a chat's body that decide how its messages become token ids."""


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
        selection: How choices are found among the candidates; None means that each candidate is a choice.
        reward: What ranks.
        calibration: How the reward is calibrated.
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
    selection: SelectionRequest | None = None
    reward: RewardChoice | None = None
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
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

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a candidate; None where the caller leaves it to the engine."""
        limit: int | None = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return limit

    @property
    def rewards(self) -> list[RewardChoice]:
        """All rewards that the request names."""
        prefix = getattr(self.selection, "prefix_reward", None)
        return [reward for reward in (self.reward, prefix) if reward is not None]

    @property
    def calibrates(self) -> bool:
        """Whether rewards are to be calibrated."""
        return self.reward is not None and self.calibration.effective_method != "none"

    @property
    def num_rollouts(self) -> int | None:
        """Reference rollouts of the prompt that calibrated rewards are estimated from; None where it is not so."""
        return self.calibration.size if self.calibration.effective_method == "reference" else None

    def request(self, prompt_index: int, candidate_index: int) -> EngineRequest:
        """The engine's request for one candidate."""
        uid = f"{self.id}-{prompt_index}-{candidate_index}"
        body = {**self.body, **self.prompts[prompt_index].fields, **self.seeded(candidate_index)}
        return EngineRequest(self.endpoint, body, self.steering(uid), uid)

    def piece_request(
        self,
        prompt_index: int,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        piece: int,
        number: int,
        max_tokens: int,
    ) -> EngineRequest:
        """The engine's request for one continuation of an answer by at most `max_tokens` tokens.

        Always a completion of token ids, so that nothing is tokenised again; a negative prompt grows with the answer.
        """
        uid = f"{self.id}-{prompt_index}-{piece}-{number}"
        body = {name: value for name, value in self.body.items() if name in PIECE_FIELDS}
        body |= {"prompt": prompt_token_ids + output_token_ids, "max_tokens": max_tokens, "return_token_ids": True}
        asked = "logprobs" if self.endpoint == "completions" else "top_logprobs"
        body["logprobs"] = self.body.get(asked) or 0
        if body.get("min_tokens"):
            body["min_tokens"] = min(max_tokens, max(0, body["min_tokens"] - len(output_token_ids)))
        steering = self.steering(uid)
        if steering is not None and steering.guidance is not None:
            grown = steering.guidance.model_copy(update={"token_ids": steering.guidance.token_ids + output_token_ids})
            steering = steering.model_copy(update={"guidance": grown})
        body |= self.seeded(piece * self.num_candidates + number)
        return EngineRequest("completions", body, steering, uid, num_begun=len(output_token_ids))

    def seeded(self, number: int) -> dict[str, int]:
        """The seed of a numbered draw, as a field of the engine's body; nothing where the caller gave no seed."""
        if self.seed is None:
            return {}
        return {"seed": (self.seed + number + _SEED_SPAN // 2) % _SEED_SPAN - _SEED_SPAN // 2}

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
    """All candidates of one prompt, best first where they are ranked, and what else was done for it.

    Attributes:
        selections: One per candidate; the first `n` are the choices.
        references: Reference rollouts that were drawn for it.
        outcome: What the strategy has to say, in the answer's form.
        left_out: Candidates that failed and that the caller wants to do without.
        discarded_tokens: Generated tokens that are in no candidate.
        piece_usages: Usage objects of the engine's requests for pieces that candidates were put together from.
    """

    selections: list[Selection]
    references: list[Candidate] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    discarded_tokens: int = 0
    piece_usages: list[dict[str, Any]] = field(default_factory=list)

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
