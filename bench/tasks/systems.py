"""The systems of a task: built, drawn from and measured, seed by seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from tasks import comparison
from tasks.dialogue_safety import dialogue_safety
from tasks.figures import best_of
from tasks.grounded import grounded
from tasks.keywords import keywords
from tasks.language_models import expert
from tasks.open_ended import open_ended
from tasks.outcomes import Outcomes, measure
from tasks.plan import Plan
from tasks.policies import ExpertPair, FineTunedPolicy
from tasks.sources import Sources
from tasks.task import Task
from tasks.toxicity import toxicity
from tasks.training import Models, costs, trained
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.config import SamplingConfig
from trimtab_training.models import end_token_ids, load_causal_lm, load_vocabulary
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.rollouts import LocalSource

_TASKS: Final[dict[str, Callable[[Sources], Task]]] = {
    "toxicity": toxicity,
    "keywords": keywords,
    "open-ended": open_ended,
    "dialogue-safety": dialogue_safety,
    "grounded": grounded,
}
_LONGEST_PROMPT = 200
"""Tokens."""
_SOURCES_SEED = 7_000_000
"""Of the base's samples that a task is made from."""


@dataclass(frozen=True, slots=True)
class World:
    """A task with all that its systems are made of.

    Attributes:
        task: Prompts, reward and judge.
        plan: Settings.
        models: Where the language models are.
        base: The loaded base.
        prompts: Held-out prompts that are measured.
        num_threads: Of torch in training.
    """

    task: Task
    plan: Plan
    models: Models
    base: Any
    prompts: Sequence[str]
    num_threads: int | None

    def run_seed(self, seed: int, names: Sequence[str]) -> tuple[dict[str, Outcomes], dict[str, Any]]:
        """Outcomes by system, and what training cost; each policy draws `plan.num_samples` outputs per prompt.

        Best-of-N chooses among the outputs that the policy alone is measured on.
        """
        plan, num = self.plan, self.plan.num_samples
        outcomes = {comparison.BASE: self.base_outcomes(seed)}
        spent: dict[str, Any] = {}
        if "ipa" in names:
            policy, prefix, spent["ipa"] = self.trained_policy("ipa", seed)
            outcomes["IPA"] = self.measured(policy, prefix, seed)
        if "fine_tuning" in names:
            policy, prefix, spent["fine_tuning"] = self.trained_policy("fine_tuning", seed)
            outcomes[comparison.TUNED] = self.measured(policy, prefix, seed)
        if "experts" in names:
            outcomes["experts"] = self.measured(self._tailored(self._experts(), plan.expert_alpha), (), seed)
        for name in (comparison.BASE, "IPA"):
            if name in outcomes:
                alone = outcomes[name]
                outcomes[f"{name}, best of {num}"] = alone.chosen(best_of(alone.scores["reward"], num))
        return outcomes, spent

    @staticmethod
    def pooled(parts: Sequence[Mapping[str, Outcomes]]) -> dict[str, Outcomes]:
        """All seeds together."""
        return {name: Outcomes.joined([part[name] for part in parts]) for name in parts[0]}

    def _tailored(self, adapter: Any, alpha: float) -> TailoredPolicy:
        return TailoredPolicy(self.base, adapter, alpha=alpha, num_known=self.models.vocabulary.num_tokens)

    def base_outcomes(self, seed: int) -> Outcomes:
        """What the base alone does."""
        start = load_causal_lm(self.models.start, dtype=torch.float32, device="cpu")
        return self.measured(self._tailored(start, 1.0), (), seed, steered=False)

    def trained_policy(self, what: Any, seed: int) -> tuple[TailoredPolicy, tuple[int, ...], dict[str, Any]]:
        """A policy trained by the plan, what its adapter sees before a prompt, and what that cost."""
        directory = trained(self.task, self.plan, self.models, what, seed=seed, num_threads=self.num_threads)
        manifest = read_manifest(directory / "version")
        model = load_causal_lm(directory / "version", dtype=torch.float32, device="cpu")
        kind = TailoredPolicy if what == "ipa" else FineTunedPolicy
        policy = kind(self.base, model, alpha=manifest.default_alpha, num_known=self.models.vocabulary.num_tokens)
        return policy, tuple(manifest.prefix_token_ids), costs(directory)

    def _experts(self) -> ExpertPair:
        models, recipe = self.models, self.plan.expert
        pair = [
            load_causal_lm(expert(models.start, items, models.vocabulary, recipe), dtype=torch.float32, device="cpu")
            for items in (self.task.good, self.task.bad)
        ]
        return ExpertPair(*pair)

    def measured(self, policy: TailoredPolicy, prefix: Sequence[int], seed: int, *, steered: bool = True) -> Outcomes:
        """`plan.num_samples` outputs for each held-out prompt, scored and judged."""
        return measure(
            self.task,
            policy,
            _source(policy, prefix, self.models, self.task.max_tokens),
            self.prompts,
            prefix=prefix,
            num_samples=self.plan.num_samples,
            seed=1_000_000 + seed,
            steered=steered,
        )


def build_world(name: str, plan: Plan, *, data: Path, base: Path, start: Path, num_threads: int | None) -> World:
    """Load the models and make the task with its reward and judge."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    vocabulary = load_vocabulary(base)
    newline = tuple(vocabulary.encode("\n"))
    loaded = load_causal_lm(base, dtype=getattr(torch, plan.base_dtype), device="cpu")
    everything = Models(base, start, vocabulary, ())
    small = load_causal_lm(start, dtype=torch.float32, device="cpu")
    policy = TailoredPolicy(loaded, small, alpha=1.0, num_known=vocabulary.num_tokens)

    def draw(prompts: Sequence[str], max_tokens: int) -> list[str]:
        source = _source(policy, (), everything, max_tokens)
        drawn = source.draw([Prompt(p) for p in prompts], num_per_prompt=1, seed=_SOURCES_SEED, steered=False)
        return [group[0].output for group in drawn]

    def cut(text: str, max_tokens: int) -> str:
        return vocabulary.decode(vocabulary.encode(text)[:max_tokens])

    def fits(prompt: str) -> bool:
        return 0 < len(vocabulary.encode(prompt)) <= _LONGEST_PROMPT

    task = _TASKS[name](Sources(data, draw, cut))
    task = replace(
        task,
        train_prompts=list(filter(fits, task.train_prompts)),
        held_out_prompts=list(filter(fits, task.held_out_prompts)),
    )
    models = Models(base, start, vocabulary, newline if task.stops_at_newline else ())
    return World(task, plan, models, loaded, task.held_out_prompts[: plan.num_prompts], num_threads)


def _source(policy: TailoredPolicy, prefix: Sequence[int], models: Models, max_tokens: int) -> LocalSource:
    return LocalSource(
        policy,
        adapter_prefix=prefix,
        vocabulary=models.vocabulary,
        sampling=SamplingConfig(max_tokens=max_tokens, stop_token_ids=models.stop_token_ids),
        end_token_ids=end_token_ids(policy.base),
    )
