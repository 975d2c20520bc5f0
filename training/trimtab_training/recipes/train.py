"""Train an adapter LM on the tailored policy, from logged and fresh rollouts to a published version."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab_adapters.contract.errors import IntegrityError, InvalidRequestError, NotFoundError
from trimtab_adapters.contract.params import VersionId
from trimtab_training.checkpoint import RunState, save_checkpoint
from trimtab_training.config import PromptFile, TrainConfig
from trimtab_training.durable_files import write_whole
from trimtab_training.evaluation.held_out import BASE, STEERED
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.limits import LimitWatch, limited
from trimtab_training.log_intake import LogIntake
from trimtab_training.logged_references import logged_reference_scores
from trimtab_training.logged_rollouts import RolloutSieve, read_logged
from trimtab_training.logged_round import load_round, save_round
from trimtab_training.models import load_vocabulary
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.orders import AddRollouts, Begin, End, TakeStep
from trimtab_training.policy import BuildPolicy, TailoredPolicy
from trimtab_training.processes import Processes, SingleProcess
from trimtab_training.prompts import Prompt, hold_out, load_split, prompts_of, read_prompts, save_split
from trimtab_training.publish import VERSIONS, VersionInfo, first_time, register_version, sweep, write_version
from trimtab_training.recipes.evaluate import Evaluation, evaluate
from trimtab_training.reference_rewards import draw_reference_scores, load_reference_scores, save_reference_scores
from trimtab_training.report.writing import write_run_report
from trimtab_training.rewards import RatedOnly, Scorer, SingleVersionScorer
from trimtab_training.rollouts import Sample
from trimtab_training.run_directory import held
from trimtab_training.tracking import Listener, Tracker
from trimtab_training.transform_config import TransformConfig
from trimtab_training.transforms import RewardTransform, build_ctrl_transform
from trimtab_training.verdict import judge_run
from trimtab_training.wiring import (
    build_learner,
    build_round_source,
    build_scorer,
    build_second_scorer,
    build_source,
    checkpoints_of,
    cpu_threads,
    find_checkpoint,
    intermediate_name,
    served_procedure,
    served_transform,
    version_info,
)

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves behind.

    Attributes:
        version: Id of the published version.
        path: Its directory.
        evaluation: `Verdict.to_json`.
        is_registered: Whether a gateway knows it.
        activated_route: Route that now uses it, if any.
        is_canary: Whether only a share of that route's requests does.
        num_steps: Optimiser steps taken.
    """

    version: VersionId
    path: str
    evaluation: dict[str, Any]
    is_registered: bool
    activated_route: str | None
    num_steps: int
    is_canary: bool = False


def train(
    config: TrainConfig,
    *,
    gateway: GatewayClient | None = None,
    scorer: Scorer | None = None,
    interruption: Interruption | None = None,
    report: Report | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    wait_for_directory: bool = False,
    processes: Processes | None = None,
    show_progress: bool | None = None,
    build_policy: BuildPolicy = TailoredPolicy,
) -> TrainResult:
    """Run the whole recipe.

    Args:
        config: What to do.
        gateway: Connection to `config.gateway`; needed exactly when that is set.
        scorer: Replaces the reward that `config.reward` names.
        interruption: Asked for a stop, the run writes a checkpoint and raises `TrainingInterrupted`.
        report: Told about progress now and then, with a JSON-able object.
        listener: Told every line of metrics.
        resume: Go on from the newest checkpoint in `config.output_dir`, if there is one. Without it a directory that
            holds checkpoints is refused.
        wait_for_directory: Whether to wait while another process holds `config.output_dir`; else that is an error.
        processes: Those that take each step together, of which this must be the first; `orders.follow` is what the
            others do.
        show_progress: Whether a progress bar is drawn; None draws it on a terminal only.
        build_policy: Puts base and adapter together; what is served is always a `TailoredPolicy`.

    Raises:
        TrimtabError: Bad input, a limit, or the gateway, a reward or the disk failed; the checkpoints stay.
        TrainingInterrupted: A stop was asked for.
    """
    if (gateway is None) != (config.gateway is None):
        raise ValueError("a connection is needed exactly when the configuration names a gateway")
    interruption = interruption or Interruption()
    with (
        held(config.output_dir, interruption, wait=wait_for_directory),
        limited(config.limits, interruption) as watch,
        cpu_threads(config.num_threads),
        torch.random.fork_rng(devices=_cuda_devices(config.models.device)),
    ):
        torch.manual_seed(config.seed)
        run = _Run(
            config, gateway, scorer, interruption, report, resume, watch, processes or SingleProcess(), build_policy
        )
        with Tracker(
            config.output_dir,
            num_steps=config.steps,
            first_step=run.learner.step,
            listener=listener,
            show_progress=show_progress,
        ) as tracker:
            return run.execute(tracker)


def _cuda_devices(device: str) -> list[int]:
    return [torch.device(device).index or 0] if device.startswith("cuda") else []


class _Run:
    """One run from its beginning or a checkpoint to the published version."""

    def __init__(
        self,
        config: TrainConfig,
        gateway: GatewayClient | None,
        scorer: Scorer | None,
        interruption: Interruption,
        report: Report | None,
        resume: bool,
        watch: LimitWatch,
        processes: Processes,
        build_policy: BuildPolicy,
    ) -> None:
        self.config = config
        self.gateway = gateway
        self.interruption = interruption
        self.report = report or (lambda progress: None)
        self.watch = watch
        self.processes = processes
        checkpoint = find_checkpoint(config, resume=resume)
        watch.go_on_from(checkpoint.run.spent_s if checkpoint else 0.0)
        processes.from_first(Begin(checkpoint))
        self.is_new = checkpoint is None
        self.vocabulary = load_vocabulary(config.models.base_model)
        self.learner, self.start = build_learner(
            config, self.vocabulary, checkpoint, processes=processes, build_policy=build_policy
        )
        self.next_round = checkpoint.run.next_round if checkpoint else 0
        self.scorer = SingleVersionScorer(
            scorer or build_scorer(config, gateway), checkpoint.run.reward_version if checkpoint else None
        )
        second = build_second_scorer(config, gateway)
        self.second_scorer = None if second is None else SingleVersionScorer(second)
        self.source = build_source(
            config,
            self.learner,
            self.vocabulary,
            gateway=gateway,
            interruption=interruption,
            describe=lambda: self._version_info(intermediate_name(config.publish.name), {}),
        )
        self.round_source = build_round_source(self.source, self.learner)
        sweep(config.output_dir, gateway)
        self.train_prompts: list[Prompt] = []
        self.held_out: list[Prompt] = []
        self.transform_config = self._transform_config()
        self.transform = RewardTransform(None, {})
        self.logged_round: list[ScoredRollout] = []

    @property
    def _round_path(self) -> Path:
        return self.config.output_dir / "logged_round.npz"

    def _transform_config(self) -> TransformConfig:
        """Of a resumed run what it began with: the route may serve something else by now, but rewards must not mix."""
        path = self.config.output_dir / "reward_transform.json"
        if self.is_new:
            found = served_transform(self.config, self.gateway)
            write_whole(path, found.model_dump_json())
            return found
        try:
            return TransformConfig.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as exc:
            raise IntegrityError(f"the reward transform of the run in {path} cannot be read: {exc}") from exc

    @property
    def _end_path(self) -> Path:
        return self.config.output_dir / "ended_at"

    def execute(self, tracker: Tracker) -> TrainResult:
        """The recipe, top to bottom."""
        self._gather_prompts_and_log(tracker)
        try:
            self._draw_round_if_due(tracker)
            if not self.learner.objective.num_rollouts:
                raise InvalidRequestError("there is nothing to learn from: no usable rollout in the log and none drawn")
            self._enter("training", tracker)
            while self.learner.step < self.config.steps:
                self.interruption.check()
                self._draw_round_if_due(tracker)
                self._train_step(tracker)
                every = self.config.checkpoint.every
                if every and self.learner.step % every == 0 and self.learner.step < self.config.steps:
                    self._save()
            self._save()
            self.processes.from_first(End())
            found = self._evaluate(tracker)
        except TrainingInterrupted:
            if self.learner.objective.num_rollouts:
                self._save()
            raise
        return self._publish(found, tracker)

    def _gather_prompts_and_log(self, tracker: Tracker) -> None:
        """Split the prompts and, in a new run, fill the pool from the log; held-out prompts never enter it."""
        split = self.config.output_dir / "prompts.json"
        if not self.is_new:
            self.train_prompts, self.held_out = load_split(split)
            self._calibrate(tracker)
            self.logged_round = load_round(self._round_path) if self._round_path.exists() else []
            return
        self._enter("reading the log", tracker)
        intake = LogIntake(self.config, self.vocabulary, is_on_policy=self.learner.objective.is_on_policy)
        sieve = intake.whole_requests(read_logged(self.config.logged, self.gateway))
        prompts = self.config.prompts
        if isinstance(prompts, PromptFile):
            found = read_prompts(prompts.path, self.vocabulary)
        else:
            found = prompts_of(sieve.rollouts, self.vocabulary)
        self.train_prompts, self.held_out = hold_out(found, self.config.evaluation.share, seed=self.config.seed)
        if not self.train_prompts:
            raise InvalidRequestError("there are no prompts to train on: the log holds no usable rollout")
        save_split(split, self.train_prompts, self.held_out)
        self._calibrate(tracker)
        intake.sift(sieve, train=self.train_prompts, held_out=self.held_out, transform=self.transform)
        self._learn_from_log(sieve, intake, tracker)

    def _learn_from_log(self, sieve: RolloutSieve, intake: LogIntake, tracker: Tracker) -> None:
        """Give what is left of the log to the objective; one that forgets keeps it, where nothing else will come."""
        figures = sieve.figures()
        sieve.report()
        if sieve.rollouts:
            rollouts = self._scored(*intake.rewarded(sieve.rollouts, self.scorer), is_current=False)
            if self.config.reward.source == "feedback":
                self.scorer.version = RatedOnly.version
            if self.learner.objective.is_on_policy and not self.config.fresh.interval:
                self.logged_round = rollouts
                save_round(self._round_path, rollouts)
            figures |= self._learn_from(rollouts)
        tracker.log(self.learner.step, {f"log/{name}": value for name, value in figures.items()})

    def _draw_round_if_due(self, tracker: Tracker) -> None:
        """Draw and score the round of this step, if it has one; only a complete round is learned from.

        Round 0 of an objective with a pool comes from the base alone and is left out when the log has given enough.
        """
        config, objective = self.config.fresh, self.learner.objective
        if not config.interval:
            if objective.is_on_policy and objective.wants_round and self.logged_round:
                self._learn_from(self.logged_round)
            return
        number = self.next_round if objective.is_on_policy else self.learner.step // config.interval
        if not (objective.wants_round if objective.is_on_policy else number >= self.next_round):
            return
        if objective.is_on_policy or number > 0 or objective.num_rollouts < config.min_pool_size:
            self._enter("drawing rollouts", tracker)
            order = np.random.default_rng([self.config.seed, 1, number]).permutation(len(self.train_prompts))
            chosen = [self.train_prompts[int(i)] for i in order[: config.prompts_per_round or len(order)]]
            drawn = self.round_source.draw(
                chosen,
                num_per_prompt=config.num_per_prompt,
                seed=self._draw_seed(number),
                steered=objective.is_on_policy or (number > 0 and not objective.learns_from_base),
            )
            samples = [sample for group in drawn for sample in group]
            rewards = self.scorer.score([sample.reward_input for sample in samples]).rewards
            figures = {**self._learn_from(self._scored(samples, rewards)), "mean_reward": float(np.mean(rewards))}
            if objective.wants_round:
                raise InvalidRequestError("a round of rollouts gave nothing to learn from: none of them can be used")
            tracker.log(self.learner.step, {f"rollouts/{name}": value for name, value in figures.items()})
            self._tell("training", mean_rollout_reward=figures["mean_reward"])
            tracker.say("training")
        self.next_round = number + 1

    def _scored(
        self, samples: Sequence[Sample], rewards: Sequence[float], *, is_current: bool = True
    ) -> list[ScoredRollout]:
        """Samples with their rewards, transformed."""
        values = self.transform([sample.prompt for sample in samples], rewards)
        groups: dict[str, int] = {}
        return [
            ScoredRollout(
                sample.prompt_token_ids,
                sample.output_token_ids,
                value,
                groups.setdefault(sample.prompt, len(groups)),
                sample.steered_logprobs,
                sample.base_logprobs,
                is_current,
            )
            for sample, value in zip(samples, values, strict=True)
        ]

    def _learn_from(self, rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
        """Give rollouts to the objective."""
        self.processes.from_first(AddRollouts(rollouts))
        figures = self.learner.add_rollouts(rollouts)
        if figures["num_unreadable"]:
            logger.warning(
                "%d of %d rollouts are empty, too long or hold unknown tokens", figures["num_unreadable"], len(rollouts)
            )
        return figures

    def _calibrate(self, tracker: Tracker) -> None:
        """Make the transform of the reward; where it needs ranks, draw the base's rollouts or, resumed, read theirs."""
        transform = build_ctrl_transform(self.transform_config, kl_coef=self.config.kl_coef)
        if transform is None:
            return
        path = self.config.output_dir / "reference_rewards.json"
        if self.is_new:
            self._enter("calibrating", tracker)
            known = logged_reference_scores(self.config, self.gateway, self.train_prompts, self.vocabulary, self.scorer)
            size = self.transform_config.num_reference
            scores = draw_reference_scores(
                self.source, self.scorer, self.train_prompts, size=size, seed=self._draw_seed(1 << 30), known=known
            )
            num_known = sum(map(len, known.values()))
            figures = {"num_from_log": num_known, "num_drawn": size * len(self.train_prompts) - num_known}
            tracker.log(self.learner.step, {f"calibration/{name}": float(num) for name, num in figures.items()})
            save_reference_scores(path, scores)
        self.transform = RewardTransform(transform, load_reference_scores(path, reward=self.scorer.name))

    def _draw_seed(self, number: int) -> int:
        """A seed of 31 bits that no other round or run shares but by chance."""
        return int(np.random.SeedSequence([self.config.seed, 3, number]).generate_state(1)[0]) >> 1

    def _train_step(self, tracker: Tracker) -> None:
        self.processes.from_first(TakeStep())
        metrics = self.learner.train_step()
        step = self.learner.step
        if step % self.config.log_every == 0 or step == self.config.steps:
            tracker.log(step, {f"train/{name}": value for name, value in metrics.flat().items()})
            kl = {"kl": metrics.figures["kl"]} if "kl" in metrics.figures else {}
            tracker.advance({"loss": metrics.loss, **kl})
            self._tell("training", loss=metrics.loss, **kl)
        else:
            tracker.advance()

    def _enter(self, phase: str, tracker: Tracker) -> None:
        """Begin a part of the run, unless it is to stop."""
        self.interruption.check()
        tracker.say(phase)
        self._tell(phase)

    def _tell(self, phase: str, **figures: float) -> None:
        self.report({"phase": phase, "step": self.learner.step, "num_steps": self.config.steps, **figures})

    def _save(self) -> None:
        save_checkpoint(
            checkpoints_of(self.config),
            self.learner,
            RunState(
                self.next_round,
                self.scorer.version,
                self.start.parent,
                self.start.control_token_ids,
                self.start.fixed_prefix,
                self.watch.spent_s,
            ),
            config=self.config,
            vocabulary=self.vocabulary,
            keep=self.config.checkpoint.keep,
        )

    def _evaluate(self, tracker: Tracker) -> Evaluation | None:
        if not self.held_out:
            return None
        self._enter("evaluating", tracker)
        found = evaluate(
            self.source,
            [self.scorer] if self.second_scorer is None else [self.scorer, self.second_scorer],
            self.learner.policy,
            self.held_out,
            adapter_prefix=self.learner.objective.prefix,
            procedure=served_procedure(self.config, self.gateway),
            sampling=self.config.sampling,
            config=self.config.evaluation,
            seed=self._draw_seed(1 << 31),
        )
        figures = found.figures.to_json()
        flat = {f"evaluation/{key}": float(value) for key, value in figures.items() if isinstance(value, int | float)}
        flat |= {f"evaluation/{who}_reward": float(figures[who]["mean_reward"]) for who in (BASE, STEERED)}
        tracker.log(self.learner.step, flat)
        return found

    def _version_info(self, name: str, evaluation: dict[str, Any]) -> VersionInfo:
        return version_info(
            self.config,
            self.learner,
            name=name,
            parent=self.start.parent,
            transform=self.transform_config,
            reward=self._reward,
            evaluation=evaluation,
        )

    def _publish(self, found: Evaluation | None, tracker: Tracker) -> TrainResult:
        """Write the version and the report, register it and switch the route if that is wanted and earned."""
        self._enter("publishing", tracker)
        config = self.config.publish
        verdict = judge_run(self.config.gate, found)
        evaluation = verdict.to_json()
        directory = write_version(
            self.config.output_dir / VERSIONS,
            self.learner.policy.adapter,
            self.vocabulary,
            replace(self._version_info(config.name, evaluation), created_at=first_time(self._end_path)),
        )
        write_run_report(
            self.config, found, verdict, version=directory.version, num_steps=self.learner.step, reward=self._reward
        )
        activated, is_canary = None, False
        if self.gateway is not None:
            version = register_version(self.gateway, directory)
            if config.route is not None and (verdict.gate.passed or not config.require_gate):
                self.interruption.check()
                activated = config.route
                is_canary = self._switch(self.gateway, config.route, version, is_forced=not verdict.gate.passed)
            elif config.route is not None:
                logger.warning(
                    "version %s has not passed the gate, the route %s stays: %s",
                    version,
                    config.route,
                    "; ".join(verdict.gate.reasons),
                )
        return TrainResult(
            version=directory.version,
            path=str(directory.path),
            evaluation=evaluation,
            is_registered=self.gateway is not None,
            activated_route=activated,
            num_steps=self.learner.step,
            is_canary=is_canary,
        )

    def _switch(self, gateway: GatewayClient, route: str, version: VersionId, *, is_forced: bool) -> bool:
        """Put the version on a route; returns whether as a canary, which a route that is made by it cannot have."""
        name, alpha, percent = self.config.publish.name, self.config.models.alpha, self.config.publish.canary_percent
        if percent is not None:
            with contextlib.suppress(NotFoundError):
                gateway.promote(route, name, version, alpha, percent=percent, is_forced=is_forced)
                return True
        gateway.activate(route, name, version, alpha)
        return False

    @property
    def _reward(self) -> str:
        """`name@version`."""
        return f"{self.scorer.name}@{self.scorer.version}"
