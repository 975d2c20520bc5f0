"""Rewards of the outputs of one prompt, calibrated where that was asked for. Strategies see nothing else of rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.records import RewardValue
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_adapters.contract.rewards import RewardChoice
from trimtab_server.decoding.candidates import ReferenceDraw
from trimtab_server.decoding.pooled import PooledCalibrators, PooledScorer
from trimtab_server.decoding.prompt_scorers import LeaveOneOutScorer, RawScorer, ReferenceScorer
from trimtab_server.decoding.reference import ReferenceCalibrators
from trimtab_server.rewards.registry import RewardRegistry

Method = Literal["auto", "reference", "leave_one_out", "pooled", "none"]


@dataclass(frozen=True, slots=True)
class CalibrationChoice:
    """How rewards are calibrated.

    Attributes:
        size: Reference rollouts per prompt; None means the default, 0 no calibration.
        method: `reference` ranks among reference rollouts of the same prompt; `leave_one_out` among the other outputs,
            which must be the reference policy's own; `pooled` by a calibrator that was fitted on other prompts; `none`
            leaves rewards raw. `auto` is `reference`, or `none` with a size of 0.
        calibrator: Id of a pooled calibrator; None means the newest that fits.
        allow_stale: Whether a pooled calibrator may be used that was made for something else. Its values are marked.
    """

    size: int | None = None
    method: Method = "auto"
    calibrator: str | None = None
    allow_stale: bool = False

    @property
    def effective_method(self) -> Literal["reference", "leave_one_out", "pooled", "none"]:
        """What `auto` and a size of 0 mean."""
        if self.method == "none" or (self.size == 0 and self.method in ("auto", "reference")):
            return "none"
        return "reference" if self.method == "auto" else self.method


class PromptScorer(Protocol):
    """Scores outputs of one prompt. May be called several times, also concurrently; all values are comparable."""

    @property
    def is_calibrated(self) -> bool:
        """Whether `score` gives calibrated values."""
        ...

    @property
    def is_incremental(self) -> bool:
        """Whether a value depends on its own output alone. Not so where outputs are ranked among each other."""
        ...

    async def prepare(self) -> None:
        """Find or make the calibrator. Not needed before `score`, but it can run while candidates are generated."""
        ...

    async def score(self, outputs: Sequence[str]) -> list[RewardValue]:
        """One value per output, in order.

        Raises:
            RewardError: An output or a reference rollout could not be scored. A missing reward is never 0.
            EngineError: The reference rollouts could not be drawn.
        """
        ...


class Scoring(Protocol):
    """Makes the scorer of a prompt."""

    async def check(self, reward: RewardChoice) -> None:
        """Raise what `for_prompt` would raise for an unknown or broken reward, before anything is generated for it."""
        ...

    async def for_prompt(
        self,
        reward: RewardChoice,
        *,
        calibration: CalibrationChoice,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
    ) -> PromptScorer:
        """The scorer of one prompt; rewards are asked for once, so that all its values come from one version.

        Raises:
            InvalidRequestError: This calibration cannot be had for this reward or prompt.
            NotFoundError: No reward of that name is registered, or there is no such pooled calibrator.
            ConflictError: The pooled calibrator was made for something else.
            RewardError: The reward is registered but cannot be loaded here.
        """
        ...


class CalibratedScoring:
    """`Scoring` with rewards from the registry and calibrators from reference rollouts.

    Args:
        registry: Finds rewards by name.
        calibrators: Finds or makes per-prompt calibrators.
        pooled: Finds pooled calibrators; None where there are none.
        base_identity: What the engine tells of the base model behind its name, None where it has not yet.
    """

    def __init__(
        self,
        registry: RewardRegistry,
        calibrators: ReferenceCalibrators,
        pooled: PooledCalibrators | None = None,
        *,
        base_identity: Callable[[], str | None] | None = None,
    ) -> None:
        self._registry = registry
        self._calibrators = calibrators
        self._pooled = pooled
        self._base_identity = base_identity

    async def check(self, reward: RewardChoice) -> None:
        """See `Scoring.check`."""
        await self._registry.resolve(reward)

    async def for_prompt(
        self,
        reward: RewardChoice,
        *,
        calibration: CalibrationChoice,
        prompt: str,
        prompt_token_ids: Sequence[int],
        draw_reference: ReferenceDraw,
    ) -> PromptScorer:
        """See `Scoring.for_prompt`."""
        resolved = await self._registry.resolve(reward)
        match calibration.effective_method:
            case "none":
                if len(resolved.parts) > 1:
                    raise InvalidRequestError(
                        "Several rewards can only be combined when they are calibrated: raw rewards have no common "
                        "scale. Leave 'calibration' out, or give a size above 0.",
                        param="calibration",
                    )
                return RawScorer(resolved, prompt)
            case "leave_one_out":
                return LeaveOneOutScorer(resolved, prompt)
            case "pooled":
                if self._pooled is None:
                    raise InvalidRequestError("There are no pooled calibrators here.", param="calibration.method")
                found = await self._pooled.find(
                    resolved,
                    ReferencePolicy.from_key(self._reference(draw_reference)),
                    calibrator_id=calibration.calibrator,
                    allow_stale=calibration.allow_stale,
                )
                return PooledScorer(resolved, found, prompt)
            case "reference":
                return ReferenceScorer(
                    resolved,
                    self._calibrators,
                    prompt,
                    prompt_token_ids,
                    draw_reference,
                    reference=self._reference(draw_reference),
                    size=calibration.size,
                )

    def _reference(self, draw_reference: ReferenceDraw) -> str:
        """The reference policy's key, with the base's identity where the engine has told it."""
        if self._base_identity is None:
            return draw_reference.key
        return ReferencePolicy.from_key(draw_reference.key).identified(self._base_identity()).key
