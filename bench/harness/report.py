"""Tables and the machine's description."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---:" for _ in header], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine() -> dict[str, Any]:
    """What a reader must know beside the figures."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
