import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.errors import TrainingLimitError
from trimtab_training.checkpoint import latest_checkpoint
from trimtab_training.config import LimitsConfig
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.limits import GIB, LimitWatch, limited, resident_bytes
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watch_of(clock: Clock, num_bytes: int = 0, **limits: Any) -> tuple[LimitWatch, Interruption]:
    interruption = Interruption()
    config = LimitsConfig.model_validate(limits)
    return LimitWatch(config, interruption, resident_bytes=lambda: num_bytes, clock=clock), interruption


def test_time_counts_over_all_attempts() -> None:
    clock = Clock()
    watch, interruption = watch_of(clock, time_s=60.0)
    watch.go_on_from(50.0)
    clock.now += 9.0
    watch.look()
    interruption.check()
    assert watch.spent_s == pytest.approx(59.0)
    clock.now += 2.0
    watch.look()
    with pytest.raises(TrainingInterrupted, match="limit"):
        interruption.check()
    assert watch.finding == "the run has taken 61.0 s, limits.time_s allows 60"


def test_a_run_that_had_its_time_is_stopped_before_it_begins() -> None:
    watch, interruption = watch_of(Clock(), time_s=60.0)
    watch.go_on_from(60.5)
    with pytest.raises(TrainingInterrupted):
        interruption.check()


def test_memory_at_the_limit_is_allowed_and_a_byte_more_is_not() -> None:
    watch, interruption = watch_of(Clock(), num_bytes=2 * GIB, memory_gib=2.0)
    watch.look()
    interruption.check()
    watch, interruption = watch_of(Clock(), num_bytes=2 * GIB + 1, memory_gib=2.0)
    watch.look()
    with pytest.raises(TrainingInterrupted):
        interruption.check()
    assert watch.finding is not None
    assert "2.00 GiB of memory, limits.memory_gib allows 2" in watch.finding


def test_nothing_is_limited_by_default() -> None:
    clock = Clock()
    watch, interruption = watch_of(clock, num_bytes=1 << 60)
    clock.now += 1e9
    watch.look()
    interruption.check()


def test_memory_of_children_counts() -> None:
    """A child that touches 200 MiB adds at least that; it also holds its own interpreter, so no more is asserted."""
    import subprocess
    import sys

    before = resident_bytes()
    code = "import sys; held = bytearray(200 << 20); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        during = resident_bytes()
        child.communicate()
    assert during - before > 200 << 20


def test_the_watch_ends_with_its_context_and_other_stops_stay_what_they_are() -> None:
    interruption = Interruption()
    interruption.request("cancelled")
    with pytest.raises(TrainingInterrupted, match="cancelled"), limited(LimitsConfig(time_s=1e-9), interruption):
        interruption.check()
    assert "limits" not in [thread.name for thread in threading.enumerate()]


LONG_RUN: dict[str, Any] = {"steps": 100_000, "fresh": {"interval": 100_000, "min_pool_size": 1}, "log_every": 1}


def test_a_run_out_of_time_fails_with_a_checkpoint_and_goes_on_with_a_higher_limit(
    make_config: Any, lucky_scorer: Scorer
) -> None:
    config = make_config(limits={"time_s": 1.5, "interval_s": 0.05}, **LONG_RUN)
    with pytest.raises(TrainingLimitError, match=r"has taken 1\.\d s, limits.time_s allows 1.5"):
        train(config, scorer=lucky_scorer)
    stopped_at = checkpointed_step(config)
    with pytest.raises(TrainingLimitError):  # what it took is not forgotten
        train(config, scorer=lucky_scorer, resume=True)
    assert checkpointed_step(config) == stopped_at
    reached: list[int] = []
    interruption = Interruption()

    def stop_after_three(progress: Any) -> None:
        reached.append(progress["step"])
        if progress["step"] >= stopped_at + 3:
            interruption.request("released")

    higher = make_config(limits={"time_s": 600.0}, **LONG_RUN)
    with pytest.raises(TrainingInterrupted, match="released"):
        train(higher, scorer=lucky_scorer, resume=True, report=stop_after_three, interruption=interruption)
    assert (min(reached), max(reached)) == (stopped_at, stopped_at + 3)


def test_a_run_that_holds_too_much_memory_fails_with_a_checkpoint(make_config: Any, lucky_scorer: Scorer) -> None:
    """From its fifth step on it takes 32 MiB more at each step and waits; 512 MiB more than now is the limit."""
    limits = {"memory_gib": resident_bytes() / GIB + 0.5, "interval_s": 0.02}
    hoard: list[bytes] = []

    def take_more(progress: Any) -> None:
        if progress["step"] >= 5:
            hoard.append(b"\1" * (32 << 20))
            time.sleep(0.05)

    config = make_config(limits=limits, **LONG_RUN)
    with pytest.raises(TrainingLimitError, match=r"GiB of memory, limits.memory_gib allows"):
        train(config, scorer=lucky_scorer, report=take_more)
    assert checkpointed_step(config) >= 5
    assert len(hoard) >= 10  # it was not stopped for less


def checkpointed_step(config: Any) -> int:
    path = latest_checkpoint(config.output_dir / "checkpoints")
    assert path is not None
    return int(json.loads((path / "state.json").read_text())["step"])


def test_time_spent_is_kept_in_the_checkpoint(make_config: Any, lucky_scorer: Scorer, tmp_path: Path) -> None:
    config = make_config(steps=2)
    began = time.monotonic()
    train(config, scorer=lucky_scorer)
    (checkpoint,) = (config.output_dir / "checkpoints").iterdir()
    spent_s = json.loads((checkpoint / "state.json").read_text())["spent_s"]
    assert 0.0 < spent_s <= time.monotonic() - began
