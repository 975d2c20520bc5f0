"""Distil a student from a base's samples, and measure how close it is."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, VocabularyError
from trimtab_training.checkpoint import (
    Checkpoint,
    RunState,
    latest_checkpoint,
    open_checkpoint,
    restore_learner,
    save_checkpoint,
)
from trimtab_training.distillation.config import DistillConfig
from trimtab_training.distillation.fidelity import FIDELITY_FILE, Fidelity, measure
from trimtab_training.distillation.student import Student
from trimtab_training.distillation.teacher_samples import TeacherSample, load_samples, save_samples
from trimtab_training.distillation.teachers import Teacher
from trimtab_training.durable_files import sync_tree
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.learner import Learner
from trimtab_training.models import Vocabulary, load_causal_lm, load_vocabulary, num_output_columns, save_causal_lm
from trimtab_training.objectives.distillation import Distillation
from trimtab_training.prompts import hold_out, read_prompts
from trimtab_training.tracking import Tracker
from trimtab_training.wiring import cpu_threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DistillResult:
    """What a distillation leaves behind.

    Attributes:
        path: The student's directory, with `fidelity.json`; None when nothing was trained.
        before: Fidelity of what the student started from.
        after: Fidelity of the student; the same when nothing was trained.
    """

    path: Path | None
    before: Fidelity
    after: Fidelity


def distill(
    config: DistillConfig,
    teacher: Teacher,
    *,
    interruption: Interruption | None = None,
    resume: bool = False,
    show_progress: bool | None = None,
) -> DistillResult:
    """Run the whole recipe.

    Args:
        config: What to do.
        teacher: Asked once; its samples are kept in `output_dir/samples.jsonl`.
        interruption: Asked for a stop, the run writes a checkpoint and raises `TrainingInterrupted`.
        resume: Go on from the newest checkpoint in `config.output_dir`, if there is one.
        show_progress: Whether a progress bar is drawn; None draws it on a terminal only.

    Raises:
        TrimtabError: Bad input, or the teacher or the disk failed; the checkpoints stay.
        TrainingInterrupted: A stop was asked for.
    """
    with cpu_threads(config.num_threads), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        run = _Run(config, teacher, interruption or Interruption(), resume)
        with Tracker(
            config.output_dir, num_steps=config.steps, first_step=run.first_step, show_progress=show_progress
        ) as tracker:
            return run.execute(tracker)


class _Run:
    """One distillation from its beginning or a checkpoint."""

    def __init__(self, config: DistillConfig, teacher: Teacher, interruption: Interruption, resume: bool) -> None:
        self.config = config
        self.interruption = interruption
        self.vocabulary = load_vocabulary(config.student)
        self.checkpoints = config.output_dir / "checkpoints"
        self.checkpoint = self._find_checkpoint(resume)
        self.first_step = self.checkpoint.step if self.checkpoint else 0
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self.train_samples, self.held_out = self._samples(teacher)

    def execute(self, tracker: Tracker) -> DistillResult:
        """The recipe, top to bottom."""
        tracker.say("measuring")
        before = measure(self._load(self.config.student), self.held_out, seed=self.config.seed)
        if not self.config.steps:
            return DistillResult(None, before, before)
        student = self._load(self.checkpoint.adapter_path if self.checkpoint else self.config.student)
        learner = Learner(
            student,
            Distillation(self.train_samples, seed=self.config.seed),
            optimiser=self.config.optimiser,
            num_steps=self.config.steps,
        )
        if self.checkpoint is not None:
            restore_learner(self.checkpoint, learner)
        try:
            self._train(learner, tracker)
        except TrainingInterrupted:
            self._save(learner)
            raise
        tracker.say("measuring")
        after = measure(student, self.held_out, seed=self.config.seed)
        return DistillResult(self._write(student, before, after), before, after)

    def _train(self, learner: Learner[Student], tracker: Tracker) -> None:
        tracker.say("training")
        every = self.config.checkpoint.every
        while learner.step < self.config.steps:
            self.interruption.check()
            metrics = learner.train_step()
            if learner.step % self.config.log_every == 0 or learner.step == self.config.steps:
                tracker.log(learner.step, {f"train/{name}": value for name, value in metrics.flat().items()})
                tracker.advance({"loss": metrics.loss})
            else:
                tracker.advance()
            if every and learner.step % every == 0:
                self._save(learner)
        self._save(learner)

    def _samples(self, teacher: Teacher) -> tuple[list[TeacherSample], list[TeacherSample]]:
        """Training and held-out samples; drawn once and kept."""
        prompts = read_prompts(self.config.prompts.path, self.vocabulary)
        _, held_out = hold_out(prompts, self.config.held_out_share, seed=self.config.seed)
        path = self.config.output_dir / "samples.jsonl"
        if not path.exists():
            drawn = teacher.draw(prompts, num_per_prompt=self.config.num_per_prompt, seed=self.config.seed)
            save_samples(path, drawn)
        held_out_keys = {prompt.key for prompt in held_out}
        parts: tuple[list[TeacherSample], list[TeacherSample]] = ([], [])
        for sample in load_samples(path):
            if max(*sample.prompt_token_ids, *sample.output_token_ids) < self.vocabulary.num_tokens:
                parts[sample.prompt in held_out_keys].append(sample)
        if not all(parts):
            raise InvalidRequestError("there are too few usable samples: some to learn from and some to measure on")
        return parts

    def _load(self, directory: Path) -> Student:
        model = load_causal_lm(directory, dtype=torch.float32, device=self.config.device)
        if num_output_columns(model) < self.vocabulary.num_tokens:
            raise VocabularyError(f"{directory} has fewer logits than its tokenizer has tokens")
        return Student(model, num_known=self.vocabulary.num_tokens)

    def _find_checkpoint(self, resume: bool) -> Checkpoint | None:
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            return None
        if not resume:
            raise ConflictError(f"{self.config.output_dir} holds a run already; resume it or choose another output_dir")
        return open_checkpoint(path, self.config)

    def _save(self, learner: Learner[Student]) -> None:
        save_checkpoint(
            self.checkpoints,
            learner,
            RunState(0, None, None),
            config=self.config,
            vocabulary=self.vocabulary,
            keep=self.config.checkpoint.keep,
        )

    def _write(self, student: Student, before: Fidelity, after: Fidelity) -> Path:
        return write_student(
            self.config.output_dir / "student",
            student.adapter,
            self.vocabulary,
            {
                **after.to_json(),
                "before": before.to_json(),
                "teacher": self.config.teacher.model_dump(mode="json"),
                "objective": "token" if self.config.top_logprobs else "sequence",
                "num_samples_learned": len(self.train_samples),
                "steps": self.config.steps,
            },
        )


def write_student(path: Path, model: Any, vocabulary: Vocabulary, fidelity: dict[str, Any]) -> Path:
    """A model directory with the fidelity beside it, in place of one that was there."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_causal_lm(model, temporary, vocabulary.path)
    for extra in _tokenizer_files(vocabulary.path.parent):
        shutil.copyfile(extra, temporary / extra.name)
    (temporary / FIDELITY_FILE).write_text(json.dumps(fidelity, indent=2) + "\n", encoding="utf-8")
    sync_tree(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def _tokenizer_files(directory: Path) -> Sequence[Path]:
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    return [directory / name for name in names if (directory / name).exists()]
