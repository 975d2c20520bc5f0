"""A report as a picture: win rate against KL, with the curves that the theory draws there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from trimtab_adapters.contract.errors import InvalidRequestError, StorageError
from trimtab_training.evaluation.figures import NUM_BINS
from trimtab_training.evaluation.guides import best_of_n_curve, optimum_curve
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.evaluation.procedures import STANDARD, Chosen, parse_procedure
from trimtab_training.evaluation.report import Report

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by most colour-blind readers (Okabe and Ito)."""
_GUIDE = "#777777"
_KL_TICKS = (0, 0.05, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_APART_PT = 9.0
"""Distance of points that would stand one above the other."""


@dataclass(frozen=True, slots=True)
class _Point:
    policy: str
    procedure: str
    kl: Estimate
    win: Estimate


def write_plot(report: Report, path: Path) -> None:
    """Write what `draw_report` draws.

    Raises:
        InvalidRequestError: The ending of the path is no format of a picture.
        StorageError: It cannot be written.
    """
    figure = draw_report(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except ValueError as exc:
        raise InvalidRequestError(f"the plot cannot be written to {path}: {exc}") from exc
    except OSError as exc:
        raise StorageError(f"the plot cannot be written to {path}: {exc}") from exc


def draw_report(report: Report) -> Figure:
    """Draw the report.

    Left, every policy under every procedure against one sample of the reference policy, and where there is a judge the
    same by the judge; then the same procedure on both sides; then where rewards stand among the reference policy's.
    """
    panels: list[Callable[[Axes], None]] = [lambda axes: _against_one(axes, report, is_judged=False)]
    if report.judge is not None:
        panels.append(lambda axes: _against_one(axes, report, is_judged=True))
    if any(rate.procedure == rate.opponent_procedure for rate in report.win_rates):
        panels.append(lambda axes: _same_procedure(axes, report))
    panels.append(lambda axes: _histogram(axes, report))
    columns = 2 if len(panels) == 4 else len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.4 * rows + 0.6), dpi=150, layout="constrained")
    for axes, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    handles = _legend(report)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * columns), fontsize=8, frameon=False
    )
    figure.suptitle(_caption(report), fontsize=9, color="#444444")
    return figure


def _against_one(axes: Axes, report: Report, *, is_judged: bool) -> None:
    points = [
        _Point(outcome.policy, outcome.procedure, outcome.kl_to_base.total, win)
        for outcome in report.outcomes
        if (win := outcome.judge_calibrated_reward if is_judged else outcome.calibrated_reward) is not None
        and outcome.kl_to_base.total is not None
    ]
    _win_rate_axes(axes, report, points, [STANDARD])
    by = f"{report.judge}, chosen by {report.reward}" if is_judged else report.reward
    axes.set_title(f"Against one sample of {report.reference}\nby {by}", fontsize=10)
    axes.set_xlabel(_kl_label(report, "KL(procedure of the policy ‖ base)"))
    left_out = len(report.outcomes) - len(points)
    if left_out:
        axes.text(0.99, 0.01, f"{left_out} not drawn: KL unknown", transform=axes.transAxes, ha="right", fontsize=7)


def _same_procedure(axes: Axes, report: Report) -> None:
    kls = {entry.policy.name: entry.figures.kl_to_base.per_sequence for entry in report.policies}
    points = [
        _Point(rate.policy, rate.procedure, kls[rate.policy], rate.win_rate)
        for rate in report.win_rates
        if rate.procedure == rate.opponent_procedure and rate.opponent == report.reference
    ]
    procedures = dict.fromkeys(parse_procedure(point.procedure) for point in points)
    _win_rate_axes(axes, report, points, [chosen for chosen in procedures if isinstance(chosen, Chosen)])
    axes.set_title(f"Against {report.reference}, the same procedure\non both sides, by {report.reward}", fontsize=10)
    axes.set_xlabel(_kl_label(report, "KL(policy ‖ base)"))


def _win_rate_axes(axes: Axes, report: Report, points: Sequence[_Point], optima: Sequence[Chosen]) -> None:
    colours, figure = _colours(report), axes.get_figure(root=True)
    assert figure is not None
    largest = max([2.0, *(_upper(point.kl) * 1.1 for point in points)])
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, largest)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _KL_TICKS if tick <= largest]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.axhline(0.5, color=_GUIDE, linewidth=0.6)
    if _has_guides(report):
        _guides(axes, optima, largest)
    for point in points:
        beside = [other for other in points if other.policy == point.policy and other.kl == point.kl]
        shift_in = (beside.index(point) - (len(beside) - 1) / 2) * _APART_PT / 72
        shifted = axes.transData + ScaledTranslation(shift_in, 0, figure.dpi_scale_trans)
        kl = max(0.0, point.kl.value)
        axes.errorbar(
            kl,
            point.win.value,
            xerr=_arms(point.kl, kl),
            yerr=_arms(point.win, point.win.value),
            fmt=_marker(point.procedure),
            color=colours[point.policy],
            markersize=6,
            capsize=2,
            linewidth=1,
            clip_on=False,
            transform=shifted,
            zorder=3,
        )
        axes.annotate(
            _short(point.procedure),
            (kl, point.win.value),
            xycoords=shifted,
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=7,
            color=colours[point.policy],
        )
    lows = [point.win.low if point.win.low is not None else point.win.value for point in points]
    axes.set_ylim(min([0.45, *(low - 0.03 for low in lows)]), 1.0)
    axes.set_ylabel("win rate, ties half")


def _guides(axes: Axes, optima: Sequence[Chosen], largest_kl: float) -> None:
    for i, chosen in enumerate(optima):
        kls, wins = optimum_curve(chosen, largest_kl)
        axes.plot(kls, wins, color=_GUIDE, linewidth=1, linestyle=":")
        if len(optima) > 1:
            at = int(np.searchsorted(wins, 0.5 + (0.35 + 0.1 * (i % 4)) * (wins[-1] - 0.5)))
            name = "1" if chosen.n == 1 else f"{chosen.n}{'▲' if chosen.extreme == 'best' else '▼'}"
            where = (kls[at], wins[at])
            axes.annotate(name, where, xytext=(-3, 2), textcoords="offset points", fontsize=7, color=_GUIDE, ha="right")
    axes.plot(*best_of_n_curve(largest_kl), color=_GUIDE, linewidth=1, linestyle="--")


def _has_guides(report: Report) -> bool:
    """Whether the KL that is drawn is that to the reference policy, of policies as they were sampled."""
    (reference,) = (entry.policy for entry in report.policies if entry.policy.name == report.reference)
    return reference.steering is None and report.kl_is_of_sampled_policy


def _histogram(axes: Axes, report: Report) -> None:
    colours = _colours(report)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    for entry in report.policies:
        name = entry.policy.name
        mean = entry.figures.calibrated_reward.value
        axes.stairs(
            np.array(entry.figures.calibrated_histogram) * NUM_BINS,
            edges,
            color=colours[name],
            linewidth=1.8,
            baseline=None,
            label=f"{name}, mean {mean:.2f}",
        )
    axes.axhline(1.0, color=_GUIDE, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Calibrated rewards of single samples\nagainst {report.reference}, by {report.reward}", fontsize=10)
    axes.set_xlabel("share of the reference's samples that score lower")
    axes.set_ylabel("density")
    axes.legend(fontsize=8, frameon=False)


def _legend(report: Report) -> list[Artist]:
    """What colours, lines and markers mean, as far as they occur."""
    handles: list[Artist] = [Patch(color=colour, label=name) for name, colour in _colours(report).items()]
    kinds = {
        _marker(procedure): name for procedure, name in ((o.procedure, _kind(o.procedure)) for o in report.outcomes)
    }
    handles += [Line2D([], [], color=_GUIDE, marker=m, linestyle="", label=name) for m, name in kinds.items()]
    if _has_guides(report):
        handles.append(Line2D([], [], color=_GUIDE, linestyle="--", label="best-of-n of the base, no ties"))
        handles.append(Line2D([], [], color=_GUIDE, linestyle=":", label="most that any policy can win"))
    return handles


def _caption(report: Report) -> str:
    interval = report.settings["interval"]
    return (
        f"{report.prompts['num']} prompts × {report.settings['samples']} samples; bars: {interval['confidence']:.0%} "
        f"intervals over prompts ({interval['method']})"
    )


def _kl_label(report: Report, what: str) -> str:
    return f"{what}, nats per sequence" + ("" if report.kl_is_of_sampled_policy else "\nbefore temperature and top_p")


def _colours(report: Report) -> dict[str, str]:
    return {entry.policy.name: _COLOURS[i % len(_COLOURS)] for i, entry in enumerate(report.policies)}


def _marker(procedure: str) -> str:
    parsed = parse_procedure(procedure)
    if not isinstance(parsed, Chosen):
        return "s"
    return "o" if parsed.n == 1 else "^" if parsed.extreme == "best" else "v"


def _kind(procedure: str) -> str:
    parsed = parse_procedure(procedure)
    if not isinstance(parsed, Chosen):
        return "as served"
    return "one sample" if parsed.n == 1 else f"{parsed.extreme} of n"


def _short(procedure: str) -> str:
    parsed = parse_procedure(procedure)
    if not isinstance(parsed, Chosen):
        return "served"
    return "" if parsed.n == 1 else str(parsed.n)


def _upper(estimate: Estimate) -> float:
    return estimate.value if estimate.high is None else max(estimate.value, estimate.high)


def _arms(estimate: Estimate, centre: float) -> list[list[float]] | None:
    """Lengths of the two arms of an error bar, as matplotlib wants them."""
    if estimate.low is None or estimate.high is None:
        return None
    return [[max(0.0, centre - max(0.0, estimate.low))], [max(0.0, estimate.high - centre)]]
