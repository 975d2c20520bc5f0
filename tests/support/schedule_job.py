"""A request of a random schedule: what its tokens will be, and what its record must say when it has ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from batch_runner import RunnerRequest
from operator_reference import Operators, plausible, scale_bounds
from schedule_world import Expert
from trimtab_adapters.contract.params import AlphaSchedule, SteeringOperators
from trimtab_adapters.contract.records import SteeringRecord

TOLERANCE = 1e-4
"""Float32 sums in another order differ by a few 1e-6, a wrong token or position by far more."""


@dataclass(frozen=True, slots=True)
class SteeredToken:
    """One sampled token with the rows `[V]` that it was sampled from; `acted` is False outside the schedule."""

    token: int
    base: Tensor
    steered: Tensor
    experts: list[Tensor]
    acted: bool


@dataclass(eq=False)
class Job(RunnerRequest):
    """A request whose tokens, sampled ones too, are the beginning of a script.

    Attributes:
        terms: The experts with a non-zero alpha; empty for an unsteered request.
        operators: What is done with their sum.
        has_record: Whether it asked for a record of each token.
        max_outputs: It ends after so many tokens.
        num_outputs: Tokens sampled. The live list may hold a placeholder for the last of them.
        num_chunks: Steps whose sample will be thrown away, of `num_chunks_asked` since the request was admitted.
        wait: Steps until the request is put into the batch.
        is_refused: One of its versions was not committed when its row was opened.
        has_error: Its row failed since it was opened.
        has_failed: It failed at any time, so its record must say so.
    """

    uid: str = ""
    script_number: int = 0
    script: list[int] = field(default_factory=list)
    terms: list[tuple[Expert, float]] = field(default_factory=list)
    operators: Operators = field(default_factory=Operators)
    has_record: bool = False
    max_outputs: int = 1
    num_outputs: int = 0
    num_chunks: int = 0
    num_chunks_asked: int = 0
    wait: int = 0
    is_refused: bool = False
    has_error: bool = False
    has_failed: bool = False
    history: list[SteeredToken] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.num_outputs

    @property
    def next_token(self) -> int:
        return self.script[self.num_tokens]

    @property
    def num_computed(self) -> int:
        """Tokens that the base has computed when this step is done; equal chunks until the sample counts."""
        num_done = self.num_chunks_asked - self.num_chunks + 1
        return self.num_tokens * num_done // (self.num_chunks_asked + 1) if self.num_chunks else self.num_tokens

    @property
    def factor(self) -> float:
        """What multiplies every alpha at the next token; 0 outside the schedule."""
        return self.operators.factor(self.num_outputs)

    def be_chunked(self, num_chunks: int) -> None:
        """So many steps will be thrown away when the request is next in the batch."""
        self.num_chunks = self.num_chunks_asked = num_chunks

    def expected(self, expert: Expert) -> Tensor:
        """`[V]` reference log-probabilities after the tokens so far."""
        return expert.table[self.script_number, self.num_tokens - 1]

    def remember(self, base: Tensor, steered: Tensor) -> None:
        """A steered token was sampled, perhaps in place of one whose sample was lost."""
        del self.history[self.num_outputs :]
        experts = [self.expected(expert) for expert, _ in self.terms]
        self.history.append(SteeredToken(self.next_token, base, steered, experts, self.factor > 0))

    def check_record(self, taken: list[SteeringRecord]) -> None:
        """Compare what the record buffer gave for this request with its history."""
        if not self.history and not self.has_failed:
            assert taken == []
            return
        (record,) = taken
        assert record.uid == self.uid
        if self.has_failed:
            assert record.status == "failed"
            assert record.error
            return
        assert (record.status, record.error, record.num_tokens) == ("ok", None, len(self.history))
        if self.has_record:
            self._check_values(record)
        else:
            assert not any((record.token_ids, record.steered_logprobs, record.adapter_logprobs, record.kl))

    def _check_values(self, record: SteeringRecord) -> None:
        tokens = torch.tensor([seen.token for seen in self.history])
        base = torch.log_softmax(torch.stack([seen.base for seen in self.history]), dim=-1)
        steered = torch.log_softmax(torch.stack([seen.steered for seen in self.history]), dim=-1)
        assert record.token_ids == tokens.tolist()
        want = [base, steered]
        got = [record.base_logprobs, record.steered_logprobs]
        assert len(record.adapter_logprobs) == len(self.terms)
        for table, listed in zip(want, got, strict=True):
            at_token = table.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(listed), at_token, atol=TOLERANCE, rtol=0.0)
        for position, values in enumerate(record.adapter_logprobs):
            wanted = [float(seen.experts[position][seen.token]) if seen.acted else None for seen in self.history]
            assert [value is None for value in values] == [value is None for value in wanted]
            listed = [value for value in values if value is not None]
            assert listed == pytest.approx([value for value in wanted if value is not None], abs=TOLERANCE)
        difference = torch.where(torch.isneginf(steered), 0.0, steered - base)
        kl = (steered.exp() * difference).sum(dim=-1)
        torch.testing.assert_close(torch.tensor(record.kl), kl, atol=10 * TOLERANCE, rtol=0.0)
        best = steered.topk(2, dim=-1).values
        is_tie = (best[:, 0] - best[:, 1] < 10 * TOLERANCE).tolist()
        flipped = (base.argmax(dim=-1) != steered.argmax(dim=-1)).tolist()
        assert all(tie or a == b for a, b, tie in zip(record.flipped, flipped, is_tie, strict=True))


def asked(operators: Operators) -> SteeringOperators:
    """The same as a caller asks for it."""
    schedule = AlphaSchedule(start=operators.start, first=operators.first, decay=operators.decay)
    return SteeringOperators(
        schedule=None if schedule == AlphaSchedule() else schedule,
        plausibility=operators.plausibility,
        max_kl=operators.max_kl,
    )


def steered_rows(jobs: Sequence[Job], base: Tensor, got: Tensor) -> Tensor:
    """What the rows should be after steering, all `[R, V]`.

    How far a row with a cap was moved is read from `got`, and then held inside the bounds of the reference.
    """
    steered = base.clone()
    capped: list[int] = []
    added = torch.zeros_like(base)
    for place, job in enumerate(jobs):
        for expert, alpha in job.terms if job.factor else ():
            added[place] += alpha * job.factor * job.expected(expert)
        if job.factor and job.operators.plausibility is not None:
            wide = plausible(base[place].double().numpy(), job.operators.plausibility)
            steered[place][torch.from_numpy(np.isneginf(wide))] = -torch.inf
        if job.factor and job.operators.max_kl is not None:
            capped.append(place)
    if capped:
        caps = [jobs[place].operators.max_kl or 0.0 for place in capped]
        low, high = scale_bounds(steered[capped].double().numpy(), added[capped].double().numpy(), caps)
        scale = _scale_of((got - steered)[capped], added[capped])
        added[capped] *= scale.clamp(torch.from_numpy(low).float(), torch.from_numpy(high).float())[:, None]
    return steered + added


def _scale_of(moved: Tensor, added: Tensor) -> Tensor:
    """The `[R]` multiples of `added` that fit what was moved best, over the tokens that are possible."""
    is_possible = torch.isfinite(moved)
    weight = torch.where(is_possible, added, 0.0)
    product = (torch.where(is_possible, moved, 0.0) * weight).sum(dim=-1)
    return product / weight.square().sum(dim=-1).clamp(min=1e-30)
