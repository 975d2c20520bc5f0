"""Training for a task by the product's own recipe: an adapter LM on the tailored policy, or the base itself."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.language_models import cached, fingerprint
from tasks.plan import Plan
from tasks.policies import FineTunedPolicy
from tasks.task import Scores, Task
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_training.config import TrainConfig, parse_config
from trimtab_training.gateway import ScoreReply
from trimtab_training.models import Vocabulary
from trimtab_training.policy import TailoredPolicy
from trimtab_training.recipes.train import train
from trimtab_training.rewards import LocalScorer

Trained = Literal["ipa", "fine_tuning"]

_COSTS = "costs.json"


@dataclass(frozen=True, slots=True)
class Models:
    """The language models that a task starts from.

    Attributes:
        base: Directory of the base.
        start: Directory of the model that the adapter LM and the experts start from.
        vocabulary: That both share.
        stop_token_ids: Tokens that end an output, besides the base's own.
    """

    base: Path
    start: Path
    vocabulary: Vocabulary
    stop_token_ids: tuple[int, ...]


class CountingScorer:
    """A reward that counts what it is asked for: the rollouts of a run."""

    def __init__(self, name: str, scores: Scores, vocabulary: Vocabulary) -> None:
        self._scorer = LocalScorer(name, scores)
        self._vocabulary = vocabulary
        self.costs = {"rollouts": 0, "rollout_tokens": 0}

    @property
    def name(self) -> str:
        """See `Scorer`."""
        return self._scorer.name

    def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
        """See `Scorer`."""
        self.costs["rollouts"] += len(inputs)
        self.costs["rollout_tokens"] += sum(len(self._vocabulary.encode(item.output)) for item in inputs)
        return self._scorer.score(inputs)


def trained(task: Task, plan: Plan, models: Models, what: Trained, *, seed: int, num_threads: int | None) -> Path:
    """Directory with the trained version in `version`, from the cache where the same has been trained before."""
    prompts = list(task.train_prompts[: plan.train_prompts])
    settings = _settings(task, plan, models, what, seed=seed)
    recipe = {
        **{key: value for key, value in settings.items() if key != "models"},
        "models": settings["models"] | {"base_model": fingerprint(models.base)},
        "start": fingerprint(models.base if what == "fine_tuning" else models.start),
        "reward": task.reward.version,
        "prompts": prompts,
        "what": what,
    }
    recipe["models"].pop("adapter")
    return cached(what, recipe, lambda directory: _train(directory, settings, task, prompts, models, what, num_threads))


def costs(directory: Path) -> dict[str, Any]:
    """Rollouts, their tokens and optimiser steps that a version took."""
    found: dict[str, Any] = json.loads((directory / _COSTS).read_text())
    return found


def _settings(task: Task, plan: Plan, models: Models, what: Trained, *, seed: int) -> dict[str, Any]:
    """The training configuration without its paths."""
    is_adapter = what == "ipa"
    return {
        "models": {
            "base_model": str(models.base),
            "adapter": str(models.start if is_adapter else models.base),
            "alpha": plan.alpha if is_adapter else 1.0,
            "start_scale": plan.start_scale if is_adapter else 1.0,
            "base_dtype": plan.base_dtype,
        },
        "reward": {"name": task.name, "source": "local", "transform": plan.transform},
        "publish": {"name": f"{task.name}-{what}"},
        "logged": {"enabled": False},
        "fresh": {
            "source": "local",
            "interval": plan.interval,
            "prompts_per_round": plan.prompts_per_round,
            "num_per_prompt": plan.num_per_prompt,
        },
        "sampling": {"max_tokens": task.max_tokens, "stop_token_ids": list(models.stop_token_ids)},
        "objective": plan.objective,
        "optimiser": {
            "lr": plan.lr if is_adapter else plan.fine_tuning_lr,
            "eps": 1e-8,
            "batch_size": plan.batch_size,
            "warmup_steps": min(10, plan.steps // 10),
            "max_grad_norm": 1.0,
        },
        "checkpoint": {"every": 0, "keep": 1},
        "evaluation": {"share": 0.0},
        "steps": plan.steps,
        "seed": seed,
    }


def _train(
    directory: Path,
    settings: dict[str, Any],
    task: Task,
    prompts: Sequence[str],
    models: Models,
    what: Trained,
    num_threads: int | None,
) -> None:
    run = directory / "run"
    run.mkdir()
    path = run / "train_prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config: TrainConfig = parse_config(
        {
            **settings,
            "output_dir": str(run),
            "prompts": {"type": "file", "path": str(path)},
            "num_threads": num_threads,
        }
    )
    scorer = CountingScorer(task.name, task.reward, models.vocabulary)
    policy = TailoredPolicy if what == "ipa" else FineTunedPolicy
    result = train(config, scorer=scorer, build_policy=policy)
    Path(result.path).rename(directory / "version")
    (run / "metrics.jsonl").rename(directory / "metrics.jsonl")
    (directory / _COSTS).write_text(json.dumps(scorer.costs | {"steps": result.num_steps}))
    shutil.rmtree(run)
