"""Entry point of the other processes of a run; `launching.Follower` starts it and says what to do on standard input."""

import json
import logging
import os
import sys
import threading
from pathlib import Path

from trimtab_adapters.contract.errors import ProcessLostError
from trimtab_training.accelerate_processes import joined
from trimtab_training.config import TrainConfig, parse_config
from trimtab_training.orders import follow

_LOST = 3
"""Exit status of a process that the first one left behind."""


def main() -> None:
    """Follow the first process of a run to its end."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(_LOST)
    threading.Thread(target=_exit_with_the_first, name="watch", daemon=True).start()
    task = json.loads(line)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"process {task['rank']}: %(message)s")
    config = on_own_device(parse_config(task["config"]), task["rank"])
    _announce()
    try:
        with joined(
            rank=task["rank"],
            num=config.processes,
            rendezvous=Path(task["rendezvous"]),
            device=config.models.device,
        ) as processes:
            follow(config, processes)
    except ProcessLostError:  # the first process says what is wrong
        sys.exit(_LOST)


def on_own_device(config: TrainConfig, rank: int) -> TrainConfig:
    """The configuration with this process's GPU in the place of plain `cuda`."""
    if config.models.device != "cuda":
        return config
    return config.model_copy(update={"models": config.models.model_copy(update={"device": f"cuda:{rank}"})})


def _announce() -> None:
    """Say on standard output that this process can be joined; what libraries print later goes to standard error."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _exit_with_the_first() -> None:
    """End this process when the first one is gone: then its end of the pipe is closed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(_LOST)


if __name__ == "__main__":
    main()
