"""Draws the curve of a measured cap."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab_server.commands.errors import CommandError


def plot_cap(cap: Mapping[str, Any], path: Path) -> None:
    """Gold reward over the number of candidates with its intervals, the fitted law and the cap.

    Args:
        cap: A `SelectionCap` as the admin API answers it.
        path: File to write; its ending names the format.

    Raises:
        CommandError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to load, rarely wanted
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as exc:
        raise CommandError("a plot needs matplotlib: install trimtab[server]") from exc
    curve = cap["curve"]
    n, gold = [point["n"] for point in curve], [point["gold"] for point in curve]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = [point["gold_low"] for point in curve], [point["gold_high"] for point in curve]
    axes.fill_between(n, low, high, alpha=0.2, label="95 % interval over prompts")
    axes.plot(n, gold, marker="o", markersize=3, label="best of n")
    axes.plot(n, [gold[0] + _gain(cap, point["kl"]) for point in curve], linestyle="--", label="fitted law")
    if cap["cap"] is not None:
        axes.axvline(cap["cap"], color="black", linewidth=1, label=f"cap {cap['cap']}")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(n[-1].bit_length())]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(f"candidates n, chosen by {cap['proxy']}")
    axes.set_ylabel(cap["gold"])
    axes.set_title(f"{cap['base_model']}: {cap['num_prompts']} prompts, {cap['num_samples']} samples", fontsize=10)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as exc:  # ValueError: matplotlib knows no format of that ending
        raise CommandError(f"{path} cannot be written: {exc}") from exc


def _gain(cap: Mapping[str, Any], kl: float) -> float:
    distance = math.sqrt(kl)
    return float(distance * (cap["alpha"] - cap["beta"] * distance))
