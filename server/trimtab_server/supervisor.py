"""The engine as a child process: started, watched, restarted when it dies, stopped without an orphan.

The child leads a process group of its own, because vLLM starts further processes. Whatever ends the child, what is left
of its group is killed; and the child asks the kernel to be told when the gateway dies (`--die-with-parent`), so that a
killed gateway leaves nothing behind either.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "waiting", "stopped"]


class EngineSupervisor:
    """Runs one engine process and keeps it running.

    Args:
        command: Program and arguments.
        is_ready: Asked while the engine starts; True once it can take requests.
        environment: Environment of the child.
        log_path: File that its output is appended to; the gateway's own standard error when None.
        first_backoff_s: Pause before the first restart. It doubles with each death that follows soon.
        max_backoff_s: Longest pause.
        healthy_s: A life at least this long resets the pause.
        stop_grace_s: How long the engine may take to stop before it is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        is_ready: Callable[[], Awaitable[bool]],
        *,
        environment: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        first_backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        healthy_s: float = 60.0,
        stop_grace_s: float = 20.0,
        poll_s: float = 0.25,
    ) -> None:
        self._command = list(command)
        self._is_ready = is_ready
        self._environment = dict(environment) if environment is not None else None
        self._log_path = log_path
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._healthy_s = healthy_s
        self._stop_grace_s = stop_grace_s
        self._poll_s = poll_s
        self._backoff_s = first_backoff_s
        self._start_s = 0.0
        self._usual_start_s = 30.0
        self.state: EngineState = "stopped"
        self.pid: int | None = None
        self.num_restarts = 0
        self.last_exit: int | None = None

    @property
    def retry_after_s(self) -> int:
        """When a caller who finds no engine should ask again, in seconds."""
        if self.state == "ready":
            return 1
        pause = self._backoff_s if self.state == "waiting" else 0.0
        elapsed = time.monotonic() - self._start_s if self.state == "starting" else 0.0
        return max(1, round(pause + self._usual_start_s - elapsed))

    async def run(self) -> None:
        """Start the engine and restart it whenever it ends, until cancelled; then stop it."""
        try:
            while True:
                started = time.monotonic()
                await self._live()
                if time.monotonic() - started >= self._healthy_s:
                    self._backoff_s = self._first_backoff_s
                self.state = "waiting"
                self.num_restarts += 1
                logger.error("engine ended with status %s; restart in %.1f s", self.last_exit, self._backoff_s)
                await asyncio.sleep(self._backoff_s)
                self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)
        finally:
            self.state = "stopped"

    async def _live(self) -> None:
        """One life of the engine, from start to end. Cancelled in the middle, it stops the engine first."""
        self.state, self._start_s = "starting", time.monotonic()
        with self._log_path.open("ab") if self._log_path else nullcontext(sys.stderr) as output:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self.pid = process.pid
        logger.info("engine started, pid %d: %s", process.pid, " ".join(self._command))
        watch = asyncio.create_task(self._watch_start())
        try:
            self.last_exit = await process.wait()
        except asyncio.CancelledError:
            await self._stop(process)
            raise
        finally:
            watch.cancel()
            _kill_group(process.pid)
            self.pid = None

    async def _watch_start(self) -> None:
        while not await self._is_ready():
            await asyncio.sleep(self._poll_s)
        self._usual_start_s = time.monotonic() - self._start_s
        self.state = "ready"
        logger.info("engine ready after %.1f s", self._usual_start_s)

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        """SIGTERM, and SIGKILL to the whole group when the grace is over."""
        try:
            process.send_signal(signal.SIGTERM)
            self.last_exit = await asyncio.wait_for(process.wait(), self._stop_grace_s)
        except ProcessLookupError:
            return
        except TimeoutError:
            logger.warning("engine did not stop within %.0f s and is killed", self._stop_grace_s)
            _kill_group(process.pid)
            self.last_exit = await process.wait()


def _kill_group(leader_pid: int) -> None:
    """Kill what is left of a process group; that nothing is left is the usual case."""
    try:
        os.killpg(leader_pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        logger.warning("cannot kill process group %d", leader_pid)
