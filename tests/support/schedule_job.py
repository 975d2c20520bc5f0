"""A request of a random schedule: what its tokens will be, and what its record must say when it has ended."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from batch_runner import RunnerRequest
from schedule_world import Expert
from trimtab_adapters.contract.records import SteeringRecord

TOLERANCE = 1e-4
"""Float32 sums in another order differ by a few 1e-6, a wrong token or position by far more."""


@dataclass(frozen=True, slots=True)
class SteeredToken:
    """One sampled token with the rows `[V]` that it was sampled from."""

    token: int
    base: Tensor
    steered: Tensor
    experts: list[Tensor]


@dataclass(eq=False)
class Job(RunnerRequest):
    """A request whose tokens, sampled ones too, are the beginning of a script.

    Attributes:
        terms: The experts with a non-zero alpha; empty for an unsteered request.
        has_record: Whether it asked for a record of each token.
        max_outputs: It ends after so many tokens.
        num_outputs: Tokens sampled. The live list may hold a placeholder for the last of them.
        num_chunks: Steps whose sample will be thrown away.
        wait: Steps until the request is put into the batch.
        is_refused: One of its versions was not committed when its row was opened.
        has_error: Its row failed since it was opened.
        has_failed: It failed at any time, so its record must say so.
    """

    uid: str = ""
    script_number: int = 0
    script: list[int] = field(default_factory=list)
    terms: list[tuple[Expert, float]] = field(default_factory=list)
    has_record: bool = False
    max_outputs: int = 1
    num_outputs: int = 0
    num_chunks: int = 0
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

    def expected(self, expert: Expert) -> Tensor:
        """`[V]` reference log-probabilities after the tokens so far."""
        return expert.table[self.script_number, self.num_tokens - 1]

    def remember(self, base: Tensor, steered: Tensor) -> None:
        """A steered token was sampled, perhaps in place of one whose sample was lost."""
        del self.history[self.num_outputs :]
        experts = [self.expected(expert) for expert, _ in self.terms]
        self.history.append(SteeredToken(self.next_token, base, steered, experts))

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
        for position, values in enumerate(record.adapter_logprobs):
            want.append(torch.stack([seen.experts[position] for seen in self.history]))
            got.append([value for value in values if value is not None])
        for table, listed in zip(want, got, strict=True):
            at_token = table.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(listed), at_token, atol=TOLERANCE, rtol=0.0)
        difference = torch.where(torch.isneginf(steered), 0.0, steered - base)
        kl = (steered.exp() * difference).sum(dim=-1)
        torch.testing.assert_close(torch.tensor(record.kl), kl, atol=10 * TOLERANCE, rtol=0.0)
        best = steered.topk(2, dim=-1).values
        is_tie = (best[:, 0] - best[:, 1] < 10 * TOLERANCE).tolist()
        flipped = (base.argmax(dim=-1) != steered.argmax(dim=-1)).tolist()
        assert all(tie or a == b for a, b, tie in zip(record.flipped, flipped, is_tie, strict=True))
