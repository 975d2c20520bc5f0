import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.errors import ConflictError, StorageError
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.run_directory import held


def hold_for_ever(directory: Path, ready: Any) -> None:
    with held(directory, Interruption(), wait=False):
        ready.set()
        time.sleep(600)


@pytest.fixture
def other_process(tmp_path: Path) -> Any:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold_for_ever, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_two_processes_never_hold_one_directory(tmp_path: Path, other_process: Any) -> None:
    with (
        pytest.raises(ConflictError, match=f"process {other_process.pid} on "),
        held(tmp_path, Interruption(), wait=False),
    ):
        pytest.fail("the directory was held twice")


def test_a_process_that_waits_goes_on_when_the_other_is_killed(tmp_path: Path, other_process: Any) -> None:
    threading.Timer(0.5, os.kill, (other_process.pid, signal.SIGKILL)).start()
    with held(tmp_path, Interruption(), wait=True):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_waiting_can_be_interrupted(tmp_path: Path, other_process: Any) -> None:
    interruption = Interruption()
    threading.Timer(0.2, interruption.request, ("cancelled",)).start()
    with pytest.raises(TrainingInterrupted, match="cancelled"), held(tmp_path, interruption, wait=True):
        pytest.fail("the directory was held twice")


def test_a_directory_can_be_held_again_and_one_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path / "a/b", Interruption(), wait=False):
            pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="cannot be used as output_dir"),
        held(tmp_path / "file", Interruption(), wait=False),
    ):
        pytest.fail("a file is no directory")
