"""A run's figures over its steps, as `metrics.jsonl` has them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import IntegrityError

_NO_FIGURES = ("step", "time")


@dataclass(frozen=True, slots=True)
class Series:
    """One figure.

    Attributes:
        steps: Optimiser steps taken, ascending.
        values: None where the value was not finite.
    """

    steps: tuple[int, ...]
    values: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """As in `report.json`."""
        return {"steps": list(self.steps), "values": list(self.values)}


History = Mapping[str, Series]


def read_history(path: Path) -> dict[str, Series]:
    """Every figure of the file by name.

    Raises:
        IntegrityError: It cannot be read.
    """
    found: dict[str, list[tuple[int, float | None]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            figures = json.loads(line)
            for name in figures.keys() - set(_NO_FIGURES):
                value = float(figures[name])
                found.setdefault(name, []).append((int(figures["step"]), value if math.isfinite(value) else None))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise IntegrityError(f"the metrics of the run in {path} cannot be read: {exc}") from exc
    return {
        name: Series(tuple(step for step, _ in points), tuple(value for _, value in points))
        for name, points in sorted(found.items())
    }
