"""A container's health check, with the standard library alone.

    healthcheck.py [--process WORD] URL

Healthy (exit 0) when the URL answers 200 and, with `--process`, a process with that word among its arguments runs
here. Proxies of the environment are not used.
"""

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 4.0


def main() -> None:
    """Exit 0 or say what is wrong and exit 1."""
    parser = argparse.ArgumentParser(description="Check that a container is healthy.")
    parser.add_argument("--process", metavar="WORD", help="a process with this argument must run as well")
    parser.add_argument("url")
    arguments = parser.parse_args()
    if arguments.process is not None and not runs(arguments.process):
        sys.exit(f"no process {arguments.process!r} is running")
    problem = ask(arguments.url)
    if problem is not None:
        sys.exit(f"{arguments.url}: {problem}")


def ask(url: str) -> str | None:
    """None when the URL answers 200, otherwise what it did instead."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            return None if response.status == 200 else f"status {response.status}"
    except (OSError, urllib.error.URLError) as exc:
        return str(exc)


def runs(word: str, proc: Path = Path("/proc")) -> bool:
    """Whether a process other than a health check has this argument and is neither stopped nor a zombie."""
    for directory in proc.glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue  # it has ended in the meantime
        is_check = any(argument.endswith(b"healthcheck.py") for argument in arguments)
        if word.encode() in arguments and not is_check and state not in "TtZX":
            return True
    return False


if __name__ == "__main__":
    main()
