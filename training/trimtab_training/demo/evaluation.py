"""The four systems of the demonstration, measured on the same prompts and put into one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from trimtab_training.demo import text_metrics
from trimtab_training.demo.gateway import Answer, Gateway
from trimtab_training.demo.processes import BASE_MODEL, ROUTE
from trimtab_training.demo.world import kindness_reward

REWARD: Final = "demo-kindness"
BEST_OF: Final = 8
CALIBRATION_SIZE: Final = 8
SAMPLING: Final[Mapping[str, Any]] = {"max_tokens": 40, "temperature": 1.0, "stop": ["\n"]}
PROXY_NOTE: Final = (
    "The reward counts kind and rude words, checks that the thing asked for is named and that sentences have the "
    "world's form. It stands in for what a person would call a kind and helpful reply; it knows nothing of meaning, "
    "and a text can please it without pleasing a reader."
)


@dataclass(frozen=True, slots=True)
class System:
    """One way to answer a prompt: a model name, alone or with best-of-N."""

    name: str
    model: str
    best_of: int = 1

    def body(self, prompt: str) -> dict[str, Any]:
        """The body of `POST /v1/completions`."""
        body = {"model": self.model, "prompt": prompt, **SAMPLING, "steering_logprobs": True}
        if self.best_of > 1:
            body |= {"best_of": self.best_of, "reward": REWARD, "calibration": {"size": CALIBRATION_SIZE}}
        return body


SYSTEMS: Final = (
    System("base", BASE_MODEL),
    System("steered", ROUTE),
    System(f"base, best of {BEST_OF}", BASE_MODEL, BEST_OF),
    System(f"steered, best of {BEST_OF}", ROUTE, BEST_OF),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one system.

    Attributes:
        system: Which one.
        texts: Its answers, one per prompt.
        reward: Mean raw reward with its 95 % interval.
        kl: KL(steered || base) in nats per token of the chosen texts. It does not see the choice among candidates.
        perplexity: Of the chosen texts under the base.
        distinct_2: Different word pairs over all word pairs of all texts.
        repetition: Mean share of word pairs that repeat within their text.
        tokens: Mean generated tokens per answer, all candidates counted.
        reference_tokens: Mean generated tokens per answer spent on calibrating the reward.
    """

    system: System
    texts: tuple[str, ...]
    reward: text_metrics.Interval
    kl: float
    perplexity: float
    distinct_2: float
    repetition: float
    tokens: float
    reference_tokens: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the texts, as plain values."""
        return {
            "system": self.system.name,
            "model": self.system.model,
            "best_of": self.system.best_of,
            "num_prompts": len(self.texts),
            "mean_reward": self.reward.mean,
            "reward_interval_half_width": self.reward.half_width,
            "kl_per_token": self.kl,
            "selection_kl_bound_per_answer": text_metrics.best_of_n_kl_bound(self.system.best_of),
            "base_perplexity": self.perplexity,
            "distinct_2": self.distinct_2,
            "repetition": self.repetition,
            "tokens_per_answer": self.tokens,
            "reference_tokens_per_answer": self.reference_tokens,
        }


def measure(
    gateway: Gateway, system: System, prompts: Sequence[str], *, on_done: Callable[[], None] = lambda: None
) -> Figures:
    """Answer all prompts through the gateway and measure the answers."""
    answers = [choices[0] for choices in gateway.complete([system.body(p) for p in prompts], on_done=on_done)]
    return figures_of(system, prompts, answers)


def figures_of(system: System, prompts: Sequence[str], answers: Sequence[Answer]) -> Figures:
    """The figures of answers that are there already, one per prompt."""
    texts = tuple(answer.text.strip() for answer in answers)
    rewards = [kindness_reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return Figures(
        system=system,
        texts=texts,
        reward=text_metrics.mean_interval(rewards),
        kl=text_metrics.token_mean([answer.kl for answer in answers]),
        perplexity=text_metrics.perplexity([answer.base_logprobs for answer in answers]),
        distinct_2=text_metrics.distinct_n(texts),
        repetition=text_metrics.repetition(texts),
        tokens=text_metrics.mean_interval([float(answer.num_tokens) for answer in answers]).mean,
        reference_tokens=text_metrics.mean_interval([float(answer.num_reference_tokens) for answer in answers]).mean,
    )


def figures_table(rows: Sequence[Figures]) -> Table:
    """One row per system."""
    table = Table(title=f"{len(rows[0].texts)} held-out prompts through POST /v1/completions")
    table.add_column("system")
    for heading in (
        "mean reward\n(95 % interval)",
        "KL to base\n(nats/token)",
        "perplexity\nunder base",
        "distinct-2",
        "tokens per answer\n(all candidates)",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.system.name,
            f"{row.reward.mean:.3f} ± {row.reward.half_width:.3f}",
            f"{row.kl:.3f}",
            f"{row.perplexity:.2f}",
            f"{row.distinct_2:.3f}",
            f"{row.tokens:.0f}",
        )
    return table


def footnotes(rows: Sequence[Figures]) -> list[str]:
    """What one must know to read the table."""
    bound = text_metrics.best_of_n_kl_bound(BEST_OF)
    drawn = max(row.reference_tokens for row in rows)
    return [
        f"Choosing the best of {BEST_OF} moves the distribution further by at most log N - (N-1)/N = {bound:.2f} nats "
        "per answer, which the KL column does not contain.",
        f"Calibrating the reward drew {CALIBRATION_SIZE} further answers of the base per prompt once ({drawn:.0f} "
        "tokens), kept for later requests.",
        PROXY_NOTE,
    ]


def samples_table(prompts: Sequence[str], rows: Sequence[Figures], num: int = 3) -> Table:
    """The answers of all systems to the first `num` prompts."""
    table = Table(title="The same prompts, answered by each", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("system")
    table.add_column("answer", ratio=3)
    table.add_column("reward", justify="right")
    for i, prompt in enumerate(prompts[:num]):
        for j, row in enumerate(rows):
            reward = kindness_reward(prompt, row.texts[i])
            table.add_row(Text("" if j else prompt), row.system.name, Text(row.texts[i]), f"{reward:.2f}")
    return table
