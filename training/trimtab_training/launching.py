"""The processes of one run on this machine: the first one, which called, starts the others and ends them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trimtab_adapters.contract.errors import ProcessLostError
from trimtab_training.accelerate_processes import joined
from trimtab_training.config import TrainConfig
from trimtab_training.processes import Processes

_GRACE_S = 30.0


class Follower:
    """A process of its own that runs `follower_process`.

    Its standard input stays open for as long as this process lives: whatever ends this process, SIGKILL included, the
    follower sees the end of its input and exits. Signals of the terminal do not reach it: the first process, which
    they do reach, ends the run for all.

    Args:
        config: Of the run.
        rank: Its number, from 1.
        rendezvous: A file by which the processes find each other.
    """

    def __init__(self, config: TrainConfig, rank: int, rendezvous: Path) -> None:
        self.rank = rank
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trimtab_training.follower_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        task = {"config": config.model_dump(mode="json"), "rank": rank, "rendezvous": str(rendezvous)}
        self._input.write(json.dumps(task) + "\n")  # waits in the pipe

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def begin(self) -> None:
        """Give it its task and wait until it can be joined.

        Raises:
            ProcessLostError: It has ended.
        """
        try:
            self._input.flush()
            is_ready = self._output.readline() != ""
        except BrokenPipeError:
            is_ready = False
        if not is_ready:
            raise ProcessLostError(f"process {self.rank} did not start: exit status {self._process.wait(_GRACE_S)}")

    def status(self, grace_s: float) -> int | None:
        """Its exit status; None when it still runs after the grace."""
        try:
            return self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self, grace_s: float) -> None:
        """Wait for its end, by force after the grace."""
        if self.status(grace_s) is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._output.close()


@contextmanager
def launched(config: TrainConfig) -> Iterator[Processes]:
    """The `config.processes` processes of a run, for as long as the context lasts; this one is the first.

    Raises:
        ProcessLostError: One of the others ended before the run did.
    """
    followers: list[Follower] = []
    grace_s = 0.0
    with tempfile.TemporaryDirectory(prefix="trimtab-train-") as directory:
        rendezvous = Path(directory) / "rendezvous"
        try:
            followers.extend(Follower(config, rank, rendezvous) for rank in range(1, config.processes))
            for follower in followers:
                follower.begin()
            with joined(rank=0, num=config.processes, rendezvous=rendezvous, device=config.models.device) as processes:
                yield processes
            grace_s = _GRACE_S
        except ProcessLostError as exc:
            raise ProcessLostError(f"{exc.message} ({_ends_of(followers)})") from exc
        finally:
            for follower in followers:
                follower.end(grace_s)


def _ends_of(followers: Sequence[Follower]) -> str:
    ends = [(follower, follower.status(1.0)) for follower in followers]
    found = [f"process {f.rank}, id {f.pid}: exit status {status}" for f, status in ends if status is not None]
    return "; ".join(found) or "all of them still run"
