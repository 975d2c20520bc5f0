"""Virtual environments of the peers, outside the repository; made when they are missing."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a peer needs.

    Attributes:
        name: Of its environment.
        packages: For pip, pinned.
    """

    name: str
    packages: tuple[str, ...]


OPTILLM = Requirement("optillm", ("optillm==0.4.0", "torch==2.13.0+cpu"))
ITS_HUB = Requirement("its_hub", ("its_hub[lm]==1.2.0",))
TENSORZERO = Requirement("tensorzero", ("tensorzero==2026.6.0",))


class PeerMissingError(Exception):
    """A peer cannot be installed or started; the message says why."""


def peer_python(requirement: Requirement, venvs: Path) -> Path:
    """The interpreter of a peer's environment. Raises `PeerMissingError`."""
    directory = venvs / requirement.name
    python, done = directory / "bin" / "python", directory / ".installed"
    if not done.exists():
        _run([sys.executable, "-m", "venv", str(directory)])
        # uv resolves in seconds what pip searches through old releases for; where wheels lie is told to pip.
        links = [f"--find-links={place}" for place in os.environ.get("PIP_FIND_LINKS", "").split()]
        _run([str(python), "-m", "pip", "install", "--quiet", "uv"])
        _run([str(python), "-m", "uv", "pip", "install", f"--python={python}", *links, *requirement.packages])
        done.write_text(" ".join(requirement.packages) + "\n")
    return python


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise PeerMissingError((ended.stderr.strip().splitlines() or ["it failed without a word"])[-1][:200])
