"""Makes calibrators on demand: per-prompt ones for a list of prompts, or a pooled one from these or from the log."""

import asyncio
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from trimtab_adapters.contract.calibration import leave_one_out
from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError
from trimtab_adapters.contract.joint_calibration import joint_leave_one_out
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_adapters.contract.rewards import RewardChoice
from trimtab_adapters.contract.uniformity import randomised_rank
from trimtab_server.calibration.pooled_fit import MAX_ROLLOUTS, PooledFit, PromptRewards, fit_pooled
from trimtab_server.calibration.reliability import HeldOut, Reliability, measure
from trimtab_server.decoding.job import GenerationJob, JobResult, PromptInput, PromptResult
from trimtab_server.decoding.part_scores import parts_key
from trimtab_server.decoding.reference import ReferenceCalibrators, score_logged
from trimtab_server.decoding.reference_draw import BaseReferenceDraw
from trimtab_server.decoding.rollouts import rollouts_of
from trimtab_server.engine.base import Candidate, Endpoint, Engine
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.base import LoggedSample, ResolvedModel, RolloutLog, StoredPooledCalibrator
from trimtab_server.storage.calibrators import SqlPooledCalibratorStore
from trimtab_server.storage.reference_samples import SqlSampleLog

_CONCURRENT_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What to make a calibrator for.

    Attributes:
        model: The name that the caller used.
        base_model: The base model behind it.
        endpoint: The engine's route.
        prompts: Prompts to sample.
        body: The engine's request body without prompt and seed; None takes the settings that the log has most of.
        from_log: Whether to use all logged samples of the reference policy.
        samples: Reference rollouts per prompt of `prompts`.
    """

    model: str
    base_model: str
    endpoint: Endpoint
    prompts: tuple[PromptInput, ...]
    body: dict[str, Any] | None
    from_log: bool
    samples: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of it. `pooled` is None for per-prompt calibrators, which are kept prompt by prompt."""

    reward: str
    policy: ReferencePolicy
    num_prompts: int
    num_rollouts: int
    reliability: Reliability
    pooled: StoredPooledCalibrator | None = None


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Rewards of one prompt's samples."""

    prompt: str
    prompt_token_ids: tuple[int, ...]
    rewards: tuple[float, ...]


class Rewards(Protocol):
    """What is needed of the reward registry."""

    async def resolve(self, choice: RewardChoice) -> ResolvedReward:
        """Raises `NotFoundError` or `RewardError`."""
        ...


class PrimedDraw:
    """A `ReferenceDraw` whose first rollout is there already: it tells the prompt's token ids."""

    def __init__(self, draw: BaseReferenceDraw) -> None:
        self._draw = draw
        self._first: list[Candidate] = []

    @property
    def key(self) -> str:
        """See `ReferenceDraw.key`."""
        return self._draw.key

    @property
    def drawn(self) -> list[Candidate]:
        """All that was drawn."""
        return self._draw.drawn

    async def prime(self) -> Candidate:
        """Draw the first rollout."""
        self._first = await self._draw(1)
        return self._first[0]

    async def __call__(self, num: int) -> list[Candidate]:
        """`num` rollouts, the first one among them once."""
        ready, self._first = self._first[:num], []
        return ready + (await self._draw(num - len(ready)) if num > len(ready) else [])


class CalibratorFitting:
    """Makes calibrators, one call at a time. What takes long runs beside the event loop.

    Args:
        engine: Samples the base model.
        rewards: Finds rewards.
        reference: Makes and keeps per-prompt scores.
        samples: Logged samples.
        store: Keeps pooled calibrators.
        rollout_log: Gets what is drawn here.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: Rewards,
        reference: ReferenceCalibrators,
        samples: SqlSampleLog,
        store: SqlPooledCalibratorStore,
        rollout_log: RolloutLog,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._rewards = rewards
        self._reference = reference
        self._samples = samples
        self._store = store
        self._rollout_log = rollout_log
        self._clock = clock
        self._busy = asyncio.Lock()

    async def fit(self, reward_name: str, method: Literal["pooled", "reference"], request: FitRequest) -> Fitted:
        """Sample, score, fit, measure, keep. Cancelling it stops the engine's work.

        Raises:
            InvalidRequestError: There is too little to fit.
            NotFoundError: No such reward, or nothing in the log.
            ConflictError: Another call is at work.
            RewardError: A sample could not be scored.
            EngineError: The base could not be sampled.
        """
        if self._busy.locked():
            raise ConflictError("A calibrator is being fitted; ask again when it is done.", code="calibration_busy")
        async with self._busy:
            reward = await self._rewards.resolve(reward_name)
            if method == "pooled" and reward.combine is not None:
                raise InvalidRequestError(
                    f"A pooled calibrator is for one reward, and {reward_name!r} is a mix. Fit the method 'reference'.",
                    param="reward",
                )
            policy = await self._policy(request)
            sampled = await self._draw_all(reward, policy, request)
            if request.from_log and method == "pooled":
                sampled += await self._from_log(reward, policy, {one.prompt_token_ids for one in sampled})
            if method == "reference":
                return await asyncio.to_thread(partial(_fitted_reference, parts_key(reward), policy, sampled))
            groups = [PromptRewards(one.prompt, one.rewards) for one in sampled if one.prompt.strip()]
            fit = await asyncio.to_thread(partial(fit_pooled, groups, reference=policy.key, reward=parts_key(reward)))
            stored = StoredPooledCalibrator(f"cal-{uuid.uuid4().hex[:16]}", fit.calibrator, _report(fit), self._clock())
            await self._store.add(stored)
            num_rollouts = sum(len(group.rewards) for group in groups)
            return Fitted(parts_key(reward), policy, len(groups), num_rollouts, fit.reliability, stored)

    async def _policy(self, request: FitRequest) -> ReferencePolicy:
        identity = (await self._engine.status()).base_identity
        if request.body is not None:
            return ReferencePolicy.of(request.base_model, request.endpoint, request.body, identity=identity)
        policy = await self._samples.most_sampled(request.base_model, identity)
        if policy is None:
            raise NotFoundError(
                f"The log has no samples of the base model {request.base_model!r} as it is now: unsteered, without a "
                "seed. Give prompts to sample.",
                param="prompts",
                code="samples_not_found",
            )
        return policy

    async def _draw_all(self, reward: ResolvedReward, policy: ReferencePolicy, request: FitRequest) -> list[_Sampled]:
        if not request.prompts:
            return []
        assert request.body is not None, "prompts are sampled at given settings"
        slots = asyncio.Semaphore(_CONCURRENT_PROMPTS)

        async def one(prompt: PromptInput) -> _Sampled:
            async with slots:
                return await self._draw_one(reward, policy, request, prompt)

        try:
            async with asyncio.TaskGroup() as tasks:
                drawn = [tasks.create_task(one(prompt)) for prompt in request.prompts]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        # The same prompt twice is one prompt.
        return list({task.result().prompt_token_ids: task.result() for task in drawn}.values())

    async def _draw_one(
        self, reward: ResolvedReward, policy: ReferencePolicy, request: FitRequest, prompt: PromptInput
    ) -> _Sampled:
        job = GenerationJob(
            id=f"calibration-{uuid.uuid4().hex}",
            endpoint=request.endpoint,
            resolved=ResolvedModel(request.model, request.base_model, ()),
            prompts=(prompt,),
            body=request.body or {},
        )
        draw = PrimedDraw(BaseReferenceDraw(self._engine, job, 0))
        ids = (await draw.prime()).prompt_token_ids
        text = prompt.text if prompt.text is not None else await self._detokenize(ids)
        scores = await self._reference.get(
            prompt=text,
            prompt_token_ids=ids,
            reward=reward,
            draw_reference=draw,
            reference=policy.key,
            size=request.samples,
        )
        result = JobResult(job, [PromptResult([], references=draw.drawn)], completed_at=self._clock())
        await self._rollout_log.append(rollouts_of(result))
        return _Sampled(text, tuple(ids), _rewards(reward, scores.rows))

    async def _from_log(
        self, reward: ResolvedReward, policy: ReferencePolicy, drawn: set[tuple[int, ...]]
    ) -> list[_Sampled]:
        """Logged samples of prompts that were not drawn for: what was drawn is in the log as well."""
        groups: defaultdict[tuple[int, ...], list[LoggedSample]] = defaultdict(list)
        for sample in await self._samples.of_policy(policy.key, limit=MAX_ROLLOUTS):
            if sample.prompt_token_ids not in drawn:
                groups[sample.prompt_token_ids].append(sample)
        found = []
        for ids, samples in groups.items():
            text = next((s.prompt for s in samples if s.prompt is not None), None)
            text = text if text is not None else await self._detokenize(ids)
            rows = await score_logged(reward, text, samples)
            found.append(_Sampled(text, ids, tuple(row[0] for row in rows)))
        return found

    async def _detokenize(self, token_ids: Sequence[int]) -> str:
        return str((await self._engine.post("/detokenize", {"tokens": list(token_ids)}))["prompt"])


def _rewards(reward: ResolvedReward, rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """One number per rollout: of a mix the combined ranks, by which its rollouts are ranked at last."""
    if reward.combine is None:
        return tuple(row[0] for row in rows)
    return tuple(joint_leave_one_out(rows, reward.combine, reward.weights)[0])


def _fitted_reference(reward: str, policy: ReferencePolicy, sampled: Sequence[_Sampled]) -> Fitted:
    """How reliable per-prompt calibrators of one rollout less are: each is held out from the others of its prompt."""
    generator = random.Random(0)
    groups = [_leave_one_out(one.rewards, generator) for one in sampled if len(one.rewards) > 1]
    if not groups:
        raise InvalidRequestError("There is no prompt with two samples or more.", param="prompts")
    num_rollouts = sum(len(one.rewards) for one in sampled)
    return Fitted(reward, policy, len(sampled), num_rollouts, measure(groups))


def _leave_one_out(rewards: Sequence[float], generator: random.Random) -> HeldOut:
    others = len(rewards) - 1
    randomised = []
    for reward in rewards:
        below = sum(other < reward for other in rewards)
        equal = sum(other == reward for other in rewards) - 1
        randomised.append(randomised_rank(below, equal, others, generator.random()))
    return HeldOut(rewards, leave_one_out(rewards), randomised)


def _report(fit: PooledFit) -> dict[str, Any]:
    reliability = fit.reliability
    return {
        "model": fit.model,
        "pinball": fit.pinball,
        "num_prompts": reliability.num_prompts,
        "num_rollouts": reliability.num_rollouts,
        "ks_distance": reliability.ks_distance,
        "ks_critical": reliability.ks_critical,
        "ks_distance_of_all": reliability.ks_distance_of_all,
        "share_tied": reliability.share_tied,
        "coverage": [list(pair) for pair in reliability.coverage],
    }
