"""The plots of a training run, as PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trimtab_training.evaluation.held_out import Drawn, HeldOutFigures
from trimtab_training.evaluation.intervals import Estimate
from trimtab_training.report.history import History, Series

_BASE, _STEERED = "#0072B2", "#D55E00"
"""As in the plot of `trimtab evaluate`."""
_SERIES = "#333333"
_KL_SERIES = {"train/kl": "KL(tailored || base) in training", "rollouts/kl_per_output": "KL per drawn output"}
"""Figures of a run that are a KL, and what they are called; an objective has the first, the second or both."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot.

    Attributes:
        title: Heading above it.
        description: What it shows, for those who do not see it.
        png: Its bytes.
    """

    title: str
    description: str
    png: bytes


def picture(title: str, description: str, figure: Figure) -> Picture:
    """A figure as it goes into the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return Picture(title, description, buffer.getvalue())


def draw_history(history: History, figures: HeldOutFigures | None) -> Figure | None:
    """Reward and KL per step; on the right of the reward the end's held-out means. None when there is nothing to draw.

    Figures that a run does not have get no panel.
    """
    panels = [("rollouts/mean_reward", "mean reward of drawn rollouts")]
    panels += [(name, f"{label}, nats") for name, label in _KL_SERIES.items()]
    panels.append(("train/loss", "loss"))
    panels = [(name, label) for name, label in panels if name in history]
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw_series(axes, history[name])
        if name == "rollouts/mean_reward" and figures is not None:
            last = max(history[name].steps[-1], max(series.steps[-1] for series in history.values()))
            _draw_end(axes, last, figures.base.mean_reward, _BASE, "base, held out")
            _draw_end(axes, last, figures.steered.mean_reward, _STEERED, "steered, held out")
            axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
        _plain(axes)
    return figure


def draw_lengths(base: Drawn, steered: Drawn) -> Figure:
    """How long the outputs of both policies are."""
    lengths = [_lengths(drawn) for drawn in (base, steered)]
    longest = max(int(values.max()) for values in lengths)
    edges = np.linspace(-0.5, longest + 0.5, min(longest + 1, 32) + 1)
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for values, colour, name in zip(lengths, (_BASE, _STEERED), ("base", "steered"), strict=True):
        shares, _ = np.histogram(values, edges)
        label = f"{name}, mean {values.mean():.1f}"
        axes.stairs(shares / len(values), edges, color=colour, linewidth=1.8, label=label)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of outputs")
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    return figure


def _draw_series(axes: Axes, series: Series) -> None:
    values = [np.nan if value is None else value for value in series.values]
    marker = "o" if len(values) <= 40 else ""
    axes.plot(series.steps, values, color=_SERIES, linewidth=1.2, marker=marker, markersize=3)


def _draw_end(axes: Axes, step: int, estimate: Estimate, colour: str, label: str) -> None:
    arms: Sequence[Sequence[float]] | None = None
    if estimate.low is not None and estimate.high is not None:
        arms = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
    axes.errorbar(step, estimate.value, yerr=arms, fmt="s", color=colour, markersize=5, capsize=3, label=label)


def _lengths(drawn: Drawn) -> NDArray[np.int64]:
    return np.array([len(sample.output_token_ids) for group in drawn.samples for sample in group], dtype=np.int64)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
