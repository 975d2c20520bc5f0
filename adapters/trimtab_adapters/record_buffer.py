"""Records of steered candidates, kept in the engine until the gateway takes them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.steering import SteeredRow, StepResult

MAX_BUFFERED_TOKENS = 4_000_000
"""Beyond this many recorded tokens the oldest records are dropped: their requests were never asked about."""


@dataclass(slots=True)
class _Recording:
    """One record in the making. `num_tokens` counts steered tokens; the lists stay empty unless they were asked for."""

    num_tokens: int = 0
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    adapters: list[list[float]] = field(default_factory=list)
    steered: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    flipped: list[bool] = field(default_factory=list)

    def cut(self, num_tokens: int) -> None:
        """Forget what was recorded after the first `num_tokens` tokens."""
        self.num_tokens = num_tokens
        for values in (self.base, self.steered, self.kl, *self.adapters):
            del values[num_tokens:]
        del self.token_ids[num_tokens:], self.flipped[num_tokens:]


class RecordBuffer:
    """Collects records step by step. Everything in it is a function of the sampled tokens.

    A step that is run again (its sample was discarded) overwrites what it recorded before.
    """

    def __init__(self, max_tokens: int = MAX_BUFFERED_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._recordings: OrderedDict[str, _Recording] = OrderedDict()

    def observe(self, result: StepResult, sampled_token_ids: Tensor) -> None:
        """Add one step.

        Args:
            result: What the core returned for the step.
            sampled_token_ids: `[num_rows]` of the whole step, integer.
        """
        for row, _ in result.failed:
            self._recording(row).error = row.error
        for row in result.rows:
            recording = self._recording(row)
            if recording.num_tokens > row.num_output_tokens:
                self._num_tokens -= recording.num_tokens - row.num_output_tokens
                recording.cut(row.num_output_tokens)
            elif recording.num_tokens < row.num_output_tokens and recording.error is None:
                recording.error = "the engine sampled tokens of this request without steering or dropped their record"
            recording.num_tokens += 1
            self._num_tokens += 1
        asked = [place for place, row in enumerate(result.rows) if row.params.record]
        if asked:
            self._measure(result, sampled_token_ids, asked)
        while self._num_tokens > self._max_tokens and len(self._recordings) > 1:
            self._num_tokens -= self._recordings.popitem(last=False)[1].num_tokens

    def _measure(self, result: StepResult, sampled_token_ids: Tensor, asked: Sequence[int]) -> None:
        """Values at the sampled tokens of the rows that asked for them; all `[len(asked)]`."""
        places: Tensor | slice = slice(None)
        if len(asked) < len(result.rows):
            places = torch.tensor(asked, device=result.indices.device)
        tokens = sampled_token_ids[result.indices[places]].long()
        column = tokens[:, None]
        base_logits, added = result.base_logits[places], result.added[places]
        steered = result.steered_logprobs[places]
        base = torch.log_softmax(base_logits, dim=-1).gather(1, column)[:, 0]
        steered_value = steered.gather(1, column)[:, 0]
        # Steered and base log-probabilities differ by `added` and by one constant a row, which the sampled token shows:
        # it is finite there. `added` is finite everywhere, also where both are minus infinity.
        constant = steered_value - base - added.gather(1, column)[:, 0]
        kl = torch.linalg.vecdot(steered.exp(), added) + constant
        flipped = mixing.argmax(base_logits) != mixing.argmax(steered)
        adapters = [logprobs[places].gather(1, column)[:, 0].tolist() for logprobs in result.adapter_logprobs]
        columns = zip(
            asked,
            tokens.tolist(),
            base.tolist(),
            steered_value.tolist(),
            kl.clamp(min=0.0).tolist(),
            flipped.tolist(),
            strict=True,
        )
        for number, (place, token, base_logprob, steered_logprob, kl_value, flip) in enumerate(columns):
            row = result.rows[place]
            recording = self._recordings[row.params.uid]
            recording.token_ids.append(token)
            recording.base.append(base_logprob)
            recording.steered.append(steered_logprob)
            recording.kl.append(kl_value)
            recording.flipped.append(flip)
            while len(recording.adapters) < len(row.terms):
                recording.adapters.append([])
            for position in range(len(row.terms)):
                recording.adapters[position].append(adapters[position][number])

    def _recording(self, row: SteeredRow) -> _Recording:
        return self._recordings.setdefault(row.params.uid, _Recording())

    def take(self, uids: Sequence[str]) -> list[SteeringRecord]:
        """Remove and return the records of these candidates; unknown ones are left out."""
        taken: list[SteeringRecord] = []
        for uid in uids:
            recording = self._recordings.pop(uid, None)
            if recording is None:
                continue
            self._num_tokens -= recording.num_tokens
            taken.append(
                SteeringRecord(
                    uid=uid,
                    status="ok" if recording.error is None else "failed",
                    error=recording.error,
                    num_tokens=recording.num_tokens,
                    token_ids=recording.token_ids,
                    base_logprobs=recording.base,
                    adapter_logprobs=recording.adapters,
                    steered_logprobs=recording.steered,
                    kl=recording.kl,
                    flipped=recording.flipped,
                )
            )
        return taken
