import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from trimtab_training.tracking import Tracker


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_figures_go_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    with Tracker(tmp_path, num_steps=2, show_progress=False) as tracker:
        tracker.log(1, {"train/loss": 2.5})
        tracker.advance({"loss": 2.5})
    (line,) = lines(tmp_path)
    assert (line["step"], line["train/loss"]) == (1, 2.5)
    assert line["time"] > 0
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 2.5)]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with Tracker(tmp_path, num_steps=4, show_progress=False) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    with Tracker(tmp_path, num_steps=4, first_step=2, show_progress=False) as tracker:
        tracker.log(3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_listener_hears_of_a_resumed_run_what_was_written_before_it_was_killed(tmp_path: Path) -> None:
    with Tracker(tmp_path, num_steps=4, show_progress=False) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": float(step)})
    heard: list[tuple[float, float]] = []
    with Tracker(
        tmp_path, num_steps=4, first_step=2, listener=lambda line: heard.append((line["step"], line["loss"]))
    ) as tracker:
        tracker.log(3, {"loss": 30.0})
    assert heard == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_the_bar_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, num_steps=2, show_progress=True) as tracker:
        tracker.say("drawing")
        tracker.advance()
        tracker.advance({"loss": 1.25})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "loss=1.25" in captured.err
