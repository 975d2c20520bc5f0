"""How close a student is to its teacher where it matters: on what the teacher itself writes.

The mean of log p(y_t) - log p̂(y_t) over tokens of samples y of the teacher p estimates KL(p || p̂) per token. An
adapter that was trained against p̂ acts on p as it was trained to where this ratio is small (IPA, arXiv 2305.15065, on
approximate policies).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trimtab_training.distillation.student import Student
from trimtab_training.distillation.teacher_samples import TeacherSample
from trimtab_training.logits_reader import PaddedReader
from trimtab_training.padding import padded
from trimtab_training.policy import evaluating

FIDELITY_FILE = "fidelity.json"
"""In a student's directory; a training run with it as its base copies it into the manifest."""
_ROWS = 16
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Per token, in nats.

    Attributes:
        log_ratio: Mean of the teacher's less the student's log-probability on the teacher's samples; 0 for a perfect
            student.
        interval: Its 95 % bootstrap interval, samples resampled.
        log_ratio_sd: Standard deviation over tokens.
        teacher_nll: The teacher's mean negative log-probability of its own tokens: what is to be compared with.
        num_samples: Samples behind it.
        num_tokens: Their tokens.
    """

    log_ratio: float
    interval: tuple[float, float]
    log_ratio_sd: float
    teacher_nll: float
    num_samples: int
    num_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "interval": list(self.interval)}


def measure(student: Student, samples: Sequence[TeacherSample], *, seed: int) -> Fidelity:
    """Compare on samples that the student has not learned from.

    Raises:
        ValueError: There are none that it can read.
    """
    readable = [s for s in samples if student.can_read(s.prompt_token_ids, s.output_token_ids, ())]
    if not readable:
        raise ValueError("fidelity needs at least one sample")
    ratios: list[torch.Tensor] = []
    with evaluating(student.adapter):
        for start in range(0, len(readable), _ROWS):
            ratios += _ratios(student, readable[start : start + _ROWS])
    sums = np.array([float(row.sum()) for row in ratios])
    lengths = np.array([len(row) for row in ratios])
    rng = np.random.default_rng([seed, 5])
    chosen = rng.integers(0, len(sums), (_RESAMPLES, len(sums)))
    means = sums[chosen].sum(axis=1) / lengths[chosen].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    tokens = torch.cat(ratios)
    return Fidelity(
        log_ratio=float(tokens.mean()),
        interval=(float(low), float(high)),
        log_ratio_sd=float(tokens.std(unbiased=False)),
        teacher_nll=-sum(sum(s.logprobs) for s in readable) / len(tokens),
        num_samples=len(readable),
        num_tokens=len(tokens),
    )


def _ratios(student: Student, rows: Sequence[TeacherSample]) -> list[torch.Tensor]:
    """Log-ratio of each token, one tensor per row, float64."""
    outputs, _ = padded([row.output_token_ids for row in rows], left=False, device=student.device)
    reader = PaddedReader()
    logits = reader(student.adapter, [r.prompt_token_ids for r in rows], [r.output_token_ids for r in rows])
    logprobs = torch.log_softmax(logits[..., : student.num_known].float(), dim=-1).gather(-1, outputs[..., None])[
        ..., 0
    ]
    return [
        torch.tensor(row.logprobs, dtype=torch.float64) - logprobs[i, : len(row.output_token_ids)].double().cpu()
        for i, row in enumerate(rows)
    ]
