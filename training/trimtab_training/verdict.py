"""What is to be thought of a finished run: its figures, the failures that they show, and the gate's decision."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab_training.diagnostics import Diagnosis, diagnose
from trimtab_training.evaluation.held_out import HeldOutFigures
from trimtab_training.gate import GateResult, decide
from trimtab_training.gate_config import GateConfig
from trimtab_training.recipes.evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class Verdict:
    """See the module.

    Attributes:
        figures: None when nothing was held out.
        diagnoses: Failures that they show.
        gate: The decision.
    """

    figures: HeldOutFigures | None
    diagnoses: Sequence[Diagnosis]
    gate: GateResult

    def to_json(self) -> dict[str, Any]:
        """As `evaluation` of the manifest and of a job's result: the figures, `diagnoses` and `gate`."""
        figures = {} if self.figures is None else self.figures.to_json()
        return {**figures, "diagnoses": [asdict(found) for found in self.diagnoses], "gate": self.gate.to_json()}


def judge_run(config: GateConfig, evaluation: Evaluation | None) -> Verdict:
    """Judge what an evaluation found; None is a run that held nothing out."""
    figures = None if evaluation is None else evaluation.figures
    diagnoses = [] if figures is None else diagnose(figures)
    return Verdict(figures, diagnoses, decide(config, figures, diagnoses))
