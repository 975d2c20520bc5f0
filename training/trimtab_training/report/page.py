"""`report.html`: one file without scripts, whose pictures and styles are part of it."""

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trimtab_training.report.figure_rows import comparison_rows, notes, single_rows
from trimtab_training.report.pictures import Picture
from trimtab_training.report.run_report import RunReport

_TEMPLATE = "page.html"


def render_page(run: RunReport, pictures: Sequence[Picture], *, with_samples: bool) -> str:
    """The page; `with_samples` says whether outputs are on it.

    Whatever is in the run's texts, prompts and outputs above all, is shown as text and never as markup.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = None if run.evaluation is None else run.evaluation.figures
    rewards = [] if run.evaluation is None else list(run.evaluation.base.rewards)
    return environment.get_template(_TEMPLATE).render(
        run=run,
        created=datetime.fromtimestamp(run.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        pictures=[(plot, base64.b64encode(plot.png).decode("ascii")) for plot in pictures],
        comparison=[] if figures is None else comparison_rows(figures),
        singles=[] if figures is None else single_rows(figures),
        notes=[] if figures is None else notes(figures),
        rewards=rewards,
        samples=run.samples if with_samples else (),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )
