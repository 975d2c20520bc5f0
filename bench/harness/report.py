"""Tables and the machine's description."""

import os
import platform
from collections.abc import Sequence
from typing import Any


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---:" for _ in header], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine() -> dict[str, Any]:
    """What a reader must know beside the figures."""
    import torch

    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")  # noqa: SIM115
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
