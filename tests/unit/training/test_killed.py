"""Runs that are killed with SIGKILL, again and again, end with the weights of an undisturbed one.

Each attempt is a forked process: it has everything loaded, so an attempt takes a fraction of a second, and the signal
is a real one.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab_training.checkpoint import latest_checkpoint
from trimtab_training.config import TrainConfig
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer

EVERY = 3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "quark": {},
    "rloo": {
        "objective": {"kind": "rloo", "epochs": 2},
        "fresh": {"num_per_prompt": 2, "prompts_per_round": 8},
        "reward": {"transform": {"kind": "one_step", "n": 4, "num_reference": 3}},
    },
    "nlpo": {
        "objective": {"kind": "nlpo", "epochs": 2, "mask_min_tokens": 3, "mask_interval": 1},
        "fresh": {"num_per_prompt": 2, "prompts_per_round": 8},
    },
}


def weights(path: str | Path) -> bytes:
    return (Path(path) / "model.safetensors").read_bytes()


def attempt(run: Callable[[], None], *, timeout_s: float = 120.0) -> int:
    """Run in a forked process; returns its exit status, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout_s)
    assert process.exitcode is not None
    return process.exitcode


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file_operation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill this process just before the `number`-th flush, rename or deletion from now on."""
    left = number

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                kill_myself()
            return original(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"), (Path, "replace")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def last_step_reported(config: TrainConfig) -> int:
    path = config.output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([int(json.loads(line)["step"]) for line in lines if line.endswith("}")], default=0)


def last_step_kept(config: TrainConfig) -> int:
    path = latest_checkpoint(config.output_dir / "checkpoints")
    return int(json.loads((path / "state.json").read_text())["step"]) if path is not None else 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_killed_at_random_steps_and_file_operations_ends_with_the_same_weights(
    objective: str, make_config: Any, lucky_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd attempts die at a random step of the ten, even ones at a random file operation of the first 40.

    A checkpoint takes about 15 file operations, so both kinds of attempt get ahead now and then, and the run ends.
    """
    checkpoint = {"every": EVERY, "keep": 1}
    straight = make_config(output_dir=str(tmp_path / "straight"), checkpoint=checkpoint, **OBJECTIVES[objective])
    expected = train(straight, scorer=lucky_scorer)
    config = make_config(checkpoint=checkpoint, **OBJECTIVES[objective])
    chance = random.Random(objective)
    num_killed, num_behind = 0, 0
    for number in range(60):
        last = chance.randrange(1, 12) if number % 2 else chance.randrange(1, 41)

        def run(number: int = number, last: int = last) -> None:
            if number % 2 == 0:
                die_at_file_operation(monkeypatch, last)

            def report(progress: Any) -> None:
                if number % 2 and progress["step"] >= last:
                    kill_myself()

            train(config, scorer=lucky_scorer, report=report, resume=True)

        status = attempt(run)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        num_killed += 1
        lost = last_step_reported(config) - last_step_kept(config)
        assert lost <= EVERY
        num_behind += lost > 0
    else:
        pytest.fail("60 attempts did not finish the run")
    assert num_killed >= 5
    assert num_behind > 0  # some did lose steps, and took them again
    (version,) = (config.output_dir / "versions").glob("[0-9a-f]*")
    assert weights(version) == weights(expected.path)
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 11))
    assert not list(config.output_dir.glob("**/.tmp-*"))


def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(
    make_config: Any, lucky_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed after its end writes its last checkpoint again; it dies at every third operation."""
    config = make_config(steps=2, checkpoint={"every": 0, "keep": 1}, evaluation={"share": 0.0})
    expected = weights(train(config, scorer=lucky_scorer).path)
    again = make_config(output_dir=str(tmp_path / "again"), steps=2, checkpoint={"every": 0, "keep": 1})
    again = again.model_copy(update={"evaluation": config.evaluation})
    for number in range(1, 200, 3):
        shutil.rmtree(again.output_dir, ignore_errors=True)
        shutil.copytree(config.output_dir, again.output_dir)
        shutil.rmtree(again.output_dir / "versions")

        def run(number: int = number) -> None:
            die_at_file_operation(monkeypatch, number)
            train(again, scorer=lucky_scorer, resume=True)

        if attempt(run) == 0:
            break
        found = latest_checkpoint(again.output_dir / "checkpoints")
        assert found is not None
        assert weights(found / "adapter") == expected
        if number % 4 == 0:  # resuming takes longer than dying
            assert weights(train(again, scorer=lucky_scorer, resume=True).path) == expected
    assert number > 20  # the run did write, flush, rename and delete
