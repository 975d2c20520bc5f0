"""What a run's report says, as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab_training.diagnostics import Diagnosis
from trimtab_training.gate import GateResult
from trimtab_training.recipes.evaluate import Evaluation
from trimtab_training.report.history import History
from trimtab_training.report.samples import SamplePair

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class RunReport:
    """A finished run.

    Attributes:
        name: Of the adapter.
        version: Id of the version that came out.
        num_steps: Optimiser steps taken.
        reward: Name and version of the reward that was trained for.
        created_at: Unix seconds.
        config: The run's whole configuration.
        history: Its figures over its steps.
        evaluation: None when nothing was held out.
        diagnoses: Failures that the figures show.
        gate: The decision.
        samples: Pairs of outputs; empty where they are not to be shown.
    """

    name: str
    version: str
    num_steps: int
    reward: str
    created_at: float
    config: Mapping[str, Any]
    history: History
    evaluation: Evaluation | None
    diagnoses: Sequence[Diagnosis]
    gate: GateResult
    samples: Sequence[SamplePair]

    def to_json(self, *, with_samples: bool) -> dict[str, Any]:
        """As plain values.

        Args:
            with_samples: Whether the samples' texts are part of it.
        """
        found = self.evaluation
        samples = {"samples": [asdict(pair) for pair in self.samples]} if with_samples else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "version": self.version,
            "num_steps": self.num_steps,
            "reward": self.reward,
            "created_at": self.created_at,
            "gate": self.gate.to_json(),
            "diagnoses": [asdict(diagnosis) for diagnosis in self.diagnoses],
            "evaluation": None if found is None else found.figures.to_json(),
            "comparison": None if found is None else found.comparison.to_json(),
            "history": {name: series.to_json() for name, series in self.history.items()},
            **samples,
            "config": dict(self.config),
        }
