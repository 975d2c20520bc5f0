"""Distillation of a teacher LM into a student: likelihood of its samples, or its distribution token by token.

Sequence level: Kim and Rush, arXiv 1606.07947, on the teacher's own samples: minimising -log q(y), y ~ p, minimises
KL(p || q) over sequences. Token level, where the teacher tells its k most probable tokens: KL(p || q) with all other
tokens taken as one, which is never above the KL over the whole vocabulary and needs nothing that is not known.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab_training.distillation.student import Student
from trimtab_training.distillation.teacher_samples import TeacherSample
from trimtab_training.logits_reader import LogitsReader, PaddedReader
from trimtab_training.objectives.objective import LossSum, ObjectiveState, ScoredRollout, TokenIds
from trimtab_training.padding import padded

_SMALLEST_REST = 1e-6


class Distillation:
    """The objective; the student takes the adapter's place in the learner. Its samples never change.

    Args:
        samples: The teacher's.
        seed: Of their order.
        reader: How the student reads a batch; padded when not given.
    """

    name = "distillation"
    is_on_policy = False
    learns_from_base = False
    wants_round = False
    token_mask = None
    prefix: TokenIds = ()

    def __init__(self, samples: Sequence[TeacherSample], *, seed: int, reader: LogitsReader | None = None) -> None:
        self._samples = list(samples)
        self._rng = np.random.default_rng(seed)
        self._reader = reader or PaddedReader()
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._cursor = 0

    @property
    def num_rollouts(self) -> int:
        """Samples."""
        return len(self._samples)

    def add(self, rollouts: Sequence[ScoredRollout], policy: Student) -> Mapping[str, float]:
        """A student learns from its teacher's samples alone, which it has from the start."""
        raise TypeError("a distillation takes in no rollouts")

    def next_rows(self, num_rows: int) -> list[TeacherSample]:
        """The next samples of a shuffled pass; a pass that ends inside a step is followed by a new one."""
        chosen: list[int] = []
        while len(chosen) < num_rows:
            if self._cursor == len(self._order):
                self._order, self._cursor = self._rng.permutation(len(self._samples)), 0
            taken = self._order[self._cursor : self._cursor + num_rows - len(chosen)]
            self._cursor += len(taken)
            chosen += taken.tolist()
        return [self._samples[index] for index in chosen]

    def loss(self, policy: Student, rows: Sequence[TeacherSample]) -> LossSum:
        """Summed over output tokens, in nats."""
        outputs, mask = padded([row.output_token_ids for row in rows], left=False, device=policy.device)
        logits = self._reader(policy.adapter, [r.prompt_token_ids for r in rows], [r.output_token_ids for r in rows])
        logprobs = torch.log_softmax(logits[..., : policy.num_known].float(), dim=-1)
        student = logprobs.gather(-1, outputs[..., None])[..., 0]
        if all(top for row in rows for top in row.top_token_ids) and rows[0].top_token_ids:
            losses = coarse_kl(logprobs, *_tops(rows, mask))
        else:
            losses = -student
        teacher = torch.tensor([sum(row.logprobs) for row in rows], dtype=torch.float64).sum()
        num_tokens = int(mask.sum())
        figures = {"log_ratio": float(teacher) - float(student.detach()[mask].double().sum())}
        return LossSum(losses[mask].sum(), num_tokens, figures)

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Nothing adapts."""

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """None besides the student's."""
        return ()

    def state(self) -> ObjectiveState:
        """Where in the samples the run is; the samples themselves have a file of their own."""
        rng = json.dumps(self._rng.bit_generator.state)
        return ObjectiveState(arrays={"order": self._order}, values={"cursor": self._cursor, "rng": rng})

    def load_state(self, state: ObjectiveState) -> None:
        """See `Objective`."""
        self._order = np.asarray(state.arrays["order"], dtype=np.int64)
        self._cursor = int(state.values["cursor"])
        self._rng.bit_generator.state = json.loads(state.values["rng"])

    def describe(self) -> dict[str, Any]:
        """Number of samples."""
        return {"num_samples": len(self._samples)}


def coarse_kl(logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """KL(teacher || student) at each position with the tokens beyond the teacher's top k taken together, `[B, T]`.

    Args:
        logprobs: `[B, T, V]`, the student's, normalised.
        top_ids: `[B, T, k]`, the teacher's most probable tokens, different ones.
        top_logprobs: `[B, T, k]`, minus infinity where a position has fewer.
    """
    weights = top_logprobs.exp()
    known = weights > 0
    student = logprobs.gather(-1, top_ids)
    told = (weights * (top_logprobs.masked_fill(~known, 0.0) - student.masked_fill(~known, 0.0))).sum(dim=-1)
    rest = (1.0 - weights.sum(dim=-1)).clamp(min=0.0)
    hidden = torch.zeros_like(logprobs).scatter_add(-1, top_ids, known.to(logprobs.dtype)) > 0
    student_rest = torch.logsumexp(logprobs.masked_fill(hidden, -torch.inf), dim=-1)
    # With hardly any rest its term is next to nothing, and its logarithm is rounding error.
    has_rest = (rest > _SMALLEST_REST) & torch.isfinite(student_rest)
    safe_rest, safe_student = rest.masked_fill(~has_rest, 1.0), student_rest.masked_fill(~has_rest, 0.0)
    return told + torch.where(has_rest, safe_rest * (safe_rest.log() - safe_student), 0.0)


def _tops(rows: Sequence[TeacherSample], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's alternatives, ids and log-probabilities `[B, T, k]`; probability 0 where there are fewer."""
    width = max(len(top) for row in rows for top in row.top_token_ids)
    ids = torch.zeros(*mask.shape, width, dtype=torch.long)
    logprobs = torch.full((*mask.shape, width), -torch.inf)
    for index, row in enumerate(rows):
        for position, (tokens, values) in enumerate(zip(row.top_token_ids, row.top_logprobs, strict=True)):
            ids[index, position, : len(tokens)] = torch.tensor(tokens)
            logprobs[index, position, : len(tokens)] = torch.tensor(values)
    return ids.to(mask.device), logprobs.to(mask.device)
