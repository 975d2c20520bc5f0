"""The systems of a task against each other: every figure with its interval over the held-out prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.report import as_table
from tasks.figures import (
    Floats,
    Interval,
    bootstrap,
    mean,
    mean_difference,
    ngram_credits,
    perplexity,
    perplexity_ratio,
    ratio,
    ratio_difference,
    share_of_gain,
)
from tasks.outcomes import Outcomes
from tasks.task import LONG_ENOUGH

BASE, TUNED = "base", "fine-tuned base"

Rows = dict[str, dict[str, Interval | None]]


def compare(systems: Mapping[str, Outcomes], *, seed: int) -> Rows:
    """Figures by system and name.

    Args:
        systems: Outcomes on the same prompts; one of them is `base`.
        seed: Of the bootstrap.

    Returns:
        The judge gives what is too short a value of its own, so its mean moves with the share of outputs that are not;
        `judge of long ones` is its mean over those alone.

        For each system the means of its scores, `judge - base` (paired), `share of tuned gain` (None where the
        fine-tuned base is missing or its own gain is not clear of 0), `perplexity` under the base and its ratio to that
        of the base's own outputs, `kl` per output, `tokens`, and `distinct-n` over one output per prompt.
    """
    base, tuned = systems[BASE], systems.get(TUNED)
    gain = _gain(tuned, base, seed)
    rows: Rows = {}
    for name, outcomes in systems.items():
        judge = _per_prompt(outcomes, "judge")
        row: dict[str, Interval | None] = {
            score: bootstrap(mean, _per_prompt(outcomes, score), seed=seed) for score in outcomes.scores
        }
        row["judge - base"] = (
            None if name == BASE else bootstrap(mean_difference, judge, _per_prompt(base, "judge"), seed=seed)
        )
        if LONG_ENOUGH in outcomes.scores:
            own, other = (_long_ones(outcomes), _long_ones(base))
            row["judge of long ones"] = bootstrap(ratio, *own, seed=seed)
            row["its difference"] = None if name == BASE else bootstrap(ratio_difference, *own, *other, seed=seed)
        row["share of tuned gain"] = None
        if tuned is not None and gain is not None and gain.low > 0 and name not in (BASE, TUNED):
            reached, begun = _per_prompt(tuned, "judge"), _per_prompt(base, "judge")
            row["share of tuned gain"] = bootstrap(share_of_gain, judge, reached, begun, seed=seed)
        nll, tokens = outcomes.nll.mean(axis=1), outcomes.num_tokens.mean(axis=1)
        base_nll, base_tokens = base.nll.mean(axis=1), base.num_tokens.mean(axis=1)
        row["perplexity"] = bootstrap(perplexity, nll, tokens, seed=seed)
        row["perplexity / base"] = (
            None if name == BASE else bootstrap(perplexity_ratio, nll, tokens, base_nll, base_tokens, seed=seed)
        )
        row["kl"] = None if outcomes.kl is None else bootstrap(mean, outcomes.kl.mean(axis=1), seed=seed)
        row["tokens"] = bootstrap(mean, tokens, seed=seed)
        for n in (1, 2, 3):
            row[f"distinct-{n}"] = _distinct(outcomes, n, seed)
        rows[name] = row
    return rows


def as_rows(rows: Rows) -> list[dict[str, Any]]:
    """One JSON-able object per figure: `system`, `figure`, `value`, `low`, `high`."""
    return [
        {"system": system, "figure": figure, "value": found.value, "low": found.low, "high": found.high}
        for system, figures in rows.items()
        for figure, found in figures.items()
        if found is not None
    ]


def table(rows: Rows) -> str:
    """All figures in Markdown, one line per system."""
    names = list(next(iter(rows.values())))
    header = ["system", *names]
    return as_table(header, [[system, *(_cell(row[name]) for name in names)] for system, row in rows.items()])


def _cell(found: Interval | None) -> str:
    if found is None:
        return "-"
    digits = 3 if abs(found.value) < 10 else 1
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _gain(tuned: Outcomes | None, base: Outcomes, seed: int) -> Interval | None:
    if tuned is None:
        return None
    return bootstrap(mean_difference, _per_prompt(tuned, "judge"), _per_prompt(base, "judge"), seed=seed)


def _per_prompt(outcomes: Outcomes, score: str) -> Floats:
    return np.asarray(outcomes.scores[score].mean(axis=1))


def _long_ones(outcomes: Outcomes) -> tuple[Floats, Floats]:
    """Per prompt the judge's sum over outputs that are long enough, and their number."""
    is_long = outcomes.scores[LONG_ENOUGH]
    return (outcomes.scores["judge"] * is_long).sum(axis=1), is_long.sum(axis=1)


def _distinct(outcomes: Outcomes, n: int, seed: int) -> Interval:
    """Over one output per prompt, for each column of outputs, so that systems with more outputs compare."""
    columns: Sequence[Sequence[tuple[int, ...]]] = list(zip(*outcomes.token_ids, strict=True))
    parts = [ngram_credits(column, n) for column in columns]
    return bootstrap(
        ratio, np.sum([credit for credit, _ in parts], axis=0), np.sum([num for _, num in parts], axis=0), seed=seed
    )
