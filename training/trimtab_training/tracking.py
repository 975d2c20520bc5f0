"""Where a run's figures go: a JSON Lines file, TensorBoard and a progress bar on standard error."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"

Listener = Callable[[Mapping[str, float]], None]
"""Is told each line of the file as it is written, and in a resumed run first those that were written before."""


class Tracker:
    """Writes `output_dir/metrics.jsonl`, `output_dir/tensorboard/` and a progress bar.

    Each line of the file has `step`, `time` (Unix seconds) and the metrics by name. Figures of steps after
    `first_step`, from a run that was broken off later than its last checkpoint, are removed.

    Args:
        output_dir: Made if need be.
        num_steps: Steps of the whole run.
        first_step: Steps already taken.
        listener: Told every line that the file keeps and gets. Whoever listened before may have missed the last ones of
            a run that was killed.
        show_progress: Whether the bar is drawn; None draws it on a terminal only.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        num_steps: int,
        first_step: int = 0,
        listener: Listener | None = None,
        show_progress: bool | None = None,
    ) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / METRICS_FILE
        kept = _keep_up_to(path, first_step)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._listener = listener or (lambda line: None)
        for line in kept:
            self._listener(line)
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)
        disable = None if show_progress is None else not show_progress
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=disable, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._lines.close()
        self._board.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write figures that belong to the time after `step` steps."""
        line = {"step": step, "time": time.time(), **metrics}
        self._lines.write(json.dumps(line) + "\n")
        self._listener(line)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def advance(self, note: Mapping[str, float] | None = None) -> None:
        """Move the bar by one step; `note` is shown behind it."""
        if note:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in note.items()}, refresh=False)
        self._bar.update()

    def say(self, what: str) -> None:
        """Show what is going on in front of the bar."""
        self._bar.set_description(what)


def _keep_up_to(path: Path, step: int) -> list[dict[str, float]]:
    """Take the lines of later steps out of a file; returns those that stay."""
    if not path.exists():
        return []
    kept: list[dict[str, float]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return kept
