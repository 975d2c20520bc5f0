"""The figures of a report in the order and the words in which its page shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab_training.evaluation.held_out import HeldOutFigures
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.evaluation.tables import text_of


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One line of the table: what is measured, of the base, of the steered policy, and what became of it."""

    label: str
    base: str
    steered: str
    change: str


def comparison_rows(figures: HeldOutFigures) -> list[FigureRow]:
    """Base and steered policy next to each other."""
    base, steered, shifts = figures.base, figures.steered, figures.shifts
    ours, theirs = steered.texts, base.texts
    rows = [_row("mean reward", base.mean_reward, steered.mean_reward, figures.reward_difference, "+")]
    if figures.procedure != "standard":
        label = f"mean reward, {figures.procedure}"
        rows.append(_row(label, base.served_reward, steered.served_reward, figures.served_reward_difference, "+"))
    if (second := figures.second_reward_difference) is not None:
        rows.append(_row("second reward", base.mean_second_reward, steered.mean_second_reward, second, "+"))
        rows.append(_row("its rank correlation with the reward", base.reward_correlation, steered.reward_correlation))
    return [
        *rows,
        _row("perplexity under the base", theirs.base_perplexity, ours.base_perplexity, shifts.perplexity_ratio, "×"),
        _row("distinct-1", theirs.distinct_1, ours.distinct_1, shifts.distinct_1_ratio, "×"),
        _row("distinct-2", theirs.distinct_2, ours.distinct_2, shifts.distinct_2_ratio, "×"),
        _row("distinct-3", theirs.distinct_3, ours.distinct_3, shifts.distinct_3_ratio, "×"),
        _row("two outputs are the same", theirs.repeat_rate, ours.repeat_rate),
        _row("entropy, nats per token", theirs.entropy_per_token, ours.entropy_per_token),
        _row("tokens per output", theirs.mean_tokens, ours.mean_tokens, shifts.length_difference, "+"),
        _row("share of refusals", theirs.refusal_share, ours.refusal_share, shifts.refusal_shift, "+"),
    ]


def single_rows(figures: HeldOutFigures) -> list[tuple[str, str]]:
    """What belongs to both policies together."""
    rows = [("win rate of steered over base, one output each", text_of(figures.win_rate))]
    if figures.procedure != "standard":
        label = f"win rate of steered over base, {figures.procedure} on both sides"
        rows.append((label, text_of(figures.served_win_rate)))
    return [
        *rows,
        ("KL(steered || base) per token, nats", text_of(figures.kl_per_token)),
        ("KL(steered || base) per output, nats", text_of(figures.kl_per_output)),
    ]


def notes(figures: HeldOutFigures) -> Sequence[str]:
    """What a reader must know to read the figures right."""
    found = [
        f"In brackets: 95 % bootstrap intervals over the {figures.num_prompts} held-out prompts, "
        f"{figures.num_per_prompt} outputs each of base and steered policy."
    ]
    if not figures.kl_is_of_sampled_policy:
        found.append(
            "KL and entropy are those of the next-token distributions before temperature and top_p, along outputs that "
            "were sampled with them."
        )
    unread = {"base": figures.base.num_unread, "steered": figures.steered.num_unread}
    found += [
        f"{num} {name} outputs are not in perplexity, entropy and KL: they are empty, too long for the models, or hold "
        "tokens that the tokenizer does not have."
        for name, num in unread.items()
        if num
    ]
    if figures.num_prompts < 20:
        found.append("With fewer than 20 prompts intervals are rough: treat them as a hint.")
    return found


def _row(
    label: str,
    base: Estimate | None,
    steered: Estimate | None,
    change: Estimate | None = None,
    sign: Literal["+", "×", ""] = "",
) -> FigureRow:
    """A row; `sign` says whether the change is a difference or a quotient, or that there is none."""
    changed = f"{sign} {text_of(change)}" if sign == "×" else text_of(change) if sign else ""
    return FigureRow(label, text_of(base), text_of(steered), changed)
