"""The report of a finished run, put together and written to disk."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from trimtab_training.config import TrainConfig
from trimtab_training.evaluation.plot import draw_report
from trimtab_training.evaluation.report import write_bytes, write_text
from trimtab_training.recipes.evaluate import Evaluation
from trimtab_training.report.history import read_history
from trimtab_training.report.page import render_page
from trimtab_training.report.pictures import Picture, draw_history, draw_lengths, picture
from trimtab_training.report.run_report import RunReport
from trimtab_training.report.samples import SamplePair, choose_samples
from trimtab_training.report_config import ReportConfig
from trimtab_training.tracking import METRICS_FILE
from trimtab_training.verdict import Verdict

PAGE_FILE = "report.html"
JSON_FILE = "report.json"


def write_run_report(
    config: TrainConfig, found: Evaluation | None, verdict: Verdict, *, version: str, num_steps: int, reward: str
) -> None:
    """Write the report of a run to `output_dir/report`.

    Args:
        config: Of the run.
        found: What its evaluation found; None when nothing was held out.
        verdict: What is to be thought of it.
        version: Id of the version that came out.
        num_steps: Optimiser steps taken.
        reward: `name@version`.

    Raises:
        IntegrityError: The run's metrics cannot be read.
        StorageError: It cannot be written.
    """
    settings = config.report
    samples: Sequence[SamplePair] = ()
    if found is not None and (settings.show_samples or settings.samples_in_json):
        samples = choose_samples(found.base, found.steered, num=settings.num_samples, seed=config.seed)
    run = RunReport(
        name=config.publish.name,
        version=version,
        num_steps=num_steps,
        reward=reward,
        created_at=time.time(),
        config=config.model_dump(mode="json"),
        history=read_history(config.output_dir / METRICS_FILE),
        evaluation=found,
        diagnoses=verdict.diagnoses,
        gate=verdict.gate,
        samples=samples,
    )
    write_report(run, config.output_dir / "report", settings)


def write_report(run: RunReport, directory: Path, settings: ReportConfig) -> None:
    """Write `report.html`, `report.json` and the page's plots as files, each under a temporary name first.

    Raises:
        StorageError: It cannot be written.
    """
    pictures = draw_pictures(run) if settings.plots else {}
    content = run.to_json(with_samples=settings.samples_in_json)
    write_text(directory / JSON_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    for name, plot in pictures.items():
        write_bytes(directory / f"{name}.png", plot.png)
    page = render_page(run, list(pictures.values()), with_samples=settings.show_samples)
    write_text(directory / PAGE_FILE, page)


def draw_pictures(run: RunReport) -> dict[str, Picture]:
    """The plots of a run by the name of their file; only those that there are figures for."""
    pictures: dict[str, Picture] = {}
    found = run.evaluation
    history = draw_history(run.history, None if found is None else found.figures)
    if history is not None:
        pictures["history"] = picture(
            "Training",
            "Mean reward of the rollouts that were drawn, KL to the base and loss, step by step; the squares are the "
            "held-out means at the end, with 95 % intervals.",
            history,
        )
    if found is not None:
        pictures["win_rate"] = picture(
            "Win rate against KL",
            "Win rate over the base against KL to the base, under one sample and the served procedure, with the curve "
            "of best-of-n and the most that any policy can win at that KL; and where rewards of base and steered "
            "outputs stand among the base's for the same prompt.",
            draw_report(found.comparison),
        )
        pictures["lengths"] = picture(
            "Lengths", "Share of outputs by their number of tokens.", draw_lengths(found.base, found.steered)
        )
    return pictures
