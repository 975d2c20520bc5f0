"""A report on the terminal."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trimtab_training.evaluation.figures import OutcomeKl
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.evaluation.report import Report

_LONGEST_LABEL = 40


def report_tables(report: Report) -> list[RenderableType]:
    """Tables and notes, to be printed one after the other."""
    tables: list[RenderableType] = [_policies(report), _outcomes(report)]
    if report.win_rates:
        tables.append(_win_rates(report))
    if report.differences:
        tables.append(_differences(report))
    return [*tables, *map(Text, _notes(report))]


def _policies(report: Report) -> Table:
    settings = report.settings
    table = Table(
        title=f"{report.prompts['num']} prompts, {settings['samples']} samples each; KL to the base in nats",
        title_justify="left",
    )
    table.add_column("policy", overflow="fold")
    for heading in ("tokens", "cut", "KL / sequence", "by log-ratio", "KL / token", "calibrated reward"):
        table.add_column(Text(heading), justify="right")
    for entry in report.policies:
        figures, kl = entry.figures, entry.figures.kl_to_base
        name = entry.policy.name + (" (reference)" if entry.policy.name == report.reference else "")
        table.add_row(
            Text(name),
            f"{figures.mean_tokens:.1f}",
            f"{figures.truncated:.0%}",
            text_of(kl.per_sequence),
            text_of(kl.per_sequence_log_ratio),
            text_of(kl.per_token),
            text_of(figures.calibrated_reward),
        )
    return table


def _outcomes(report: Report) -> Table:
    table = Table(title=Text(f"Policies under procedures, by {report.reward}"), title_justify="left")
    table.add_column("policy", overflow="fold")
    table.add_column("procedure", overflow="fold")
    headings = ["mean reward", "calibrated reward", *([f"by {report.judge}"] if report.judge else []), "KL to base"]
    for heading in headings:
        table.add_column(Text(heading), justify="right")
    for outcome in report.outcomes:
        judged = [text_of(outcome.judge_calibrated_reward)] if report.judge else []
        table.add_row(
            Text(outcome.policy),
            Text(label_of(outcome.procedure)),
            text_of(outcome.mean_reward),
            text_of(outcome.calibrated_reward),
            *judged,
            _total(outcome.kl_to_base),
        )
    return table


def _win_rates(report: Report) -> Table:
    table = Table(title=Text(f"Win rates by {report.reward}, ties half"), title_justify="left")
    table.add_column("policy", overflow="fold")
    table.add_column("against", overflow="fold")
    for heading in ["win rate", *([f"by {report.judge}"] if report.judge else [])]:
        table.add_column(Text(heading), justify="right")
    for rate in report.win_rates:
        judged = [text_of(rate.judge_win_rate)] if report.judge else []
        sides = (
            Text(f"{rate.policy} @ {label_of(rate.procedure)}"),
            Text(f"{rate.opponent} @ {label_of(rate.opponent_procedure)}"),
        )
        table.add_row(*sides, text_of(rate.win_rate), *judged)
    return table


def _differences(report: Report) -> Table:
    table = Table(title=Text(f"Differences of win rates over {report.reference}"), title_justify="left")
    table.add_column("policy", overflow="fold")
    table.add_column("minus", overflow="fold")
    table.add_column("procedure", overflow="fold")
    for heading in ["difference", *([f"by {report.judge}"] if report.judge else [])]:
        table.add_column(Text(heading), justify="right")
    for row in report.differences:
        judged = [text_of(row.judge_difference)] if report.judge else []
        names = (Text(row.policy), Text(row.other), Text(label_of(row.procedure)))
        table.add_row(*names, text_of(row.difference), *judged)
    return table


def _notes(report: Report) -> list[str]:
    interval = report.settings["interval"]
    bootstrap = f", {interval['num_resamples']} resamples" if interval["method"] != "t" else ""
    notes = [
        f"In brackets: {interval['confidence']:.0%} intervals over the {report.prompts['num']} prompts "
        f"({interval['method']}{bootstrap}). Calibrated reward: win rate over one sample of {report.reference}."
    ]
    if not report.kl_is_of_sampled_policy:
        notes.append(
            "KL is that of the next-token distributions before temperature and top_p, along outputs that were sampled "
            "with them; it is not the KL of the policies as sampled."
        )
    if int(report.prompts["num"]) < 20:
        notes.append("With fewer than 20 prompts intervals are rough: treat them as a hint.")
    return notes


def _total(kl: OutcomeKl) -> str:
    if kl.total is not None:
        return text_of(kl.total)
    return "-"


def label_of(procedure: str) -> str:
    """A procedure's label, cut where it is long."""
    return procedure if len(procedure) <= _LONGEST_LABEL else procedure[: _LONGEST_LABEL - 1] + "…"


def text_of(estimate: Estimate | None) -> str:
    """Value and interval; a dash where there is none."""
    if estimate is None:
        return "-"
    value = f"{estimate.value:.3f}"
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return value
    return f"{value} [{estimate.low:.3f}, {estimate.high:.3f}]"
