"""Records of steered candidates, kept in the engine until the gateway takes them."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_adapters.contract.records import Alternative, Alternatives, SteeringRecord
from trimtab_adapters.steering import SteeredRow, StepResult

MAX_BUFFERED_TOKENS = 4_000_000
"""Beyond this many recorded tokens the oldest records are dropped: their requests were never asked about. Each
alternative of an explanation counts as a token, on either side."""


@dataclass(slots=True)
class _Recording:
    """One record in the making. `num_tokens` counts steered tokens; the lists stay empty unless they were asked for."""

    num_tokens: int = 0
    size_per_token: int = 1
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    adapters: list[list[float | None]] = field(default_factory=list)
    negative: list[float | None] | None = None
    steered: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    flipped: list[bool] = field(default_factory=list)
    alternatives: list[Alternatives] | None = None

    def cut(self, num_tokens: int) -> None:
        """Forget what was recorded after the first `num_tokens` tokens."""
        self.num_tokens = num_tokens
        for values in (self.base, self.steered, self.kl):
            del values[num_tokens:]
        for partial in (self.negative or [], *self.adapters):
            del partial[num_tokens:]
        del self.token_ids[num_tokens:], self.flipped[num_tokens:]
        if self.alternatives is not None:
            del self.alternatives[num_tokens:]

    def record(self, uid: str, start: int = 0) -> SteeringRecord:
        """What the gateway gets, from token `start` on."""
        return SteeringRecord(
            uid=uid,
            status="ok" if self.error is None else "failed",
            error=self.error,
            num_tokens=max(self.num_tokens - start, 0),
            token_ids=self.token_ids[start:],
            base_logprobs=self.base[start:],
            adapter_logprobs=[values[start:] for values in self.adapters],
            negative_logprobs=None if self.negative is None else self.negative[start:],
            steered_logprobs=self.steered[start:],
            kl=self.kl[start:],
            flipped=self.flipped[start:],
            alternatives=None if self.alternatives is None else self.alternatives[start:],
        )


class RecordBuffer:
    """Collects records step by step. Everything in it is a function of the sampled tokens.

    A step that is run again (its sample was discarded) overwrites what it recorded before.
    """

    def __init__(self, max_tokens: int = MAX_BUFFERED_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._size = 0
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
                self._size -= (recording.num_tokens - row.num_output_tokens) * recording.size_per_token
                recording.cut(row.num_output_tokens)
            elif recording.num_tokens < row.num_output_tokens and recording.error is None:
                recording.error = "the engine sampled tokens of this request without steering or dropped their record"
            recording.num_tokens += 1
            self._size += recording.size_per_token
        asked = [place for place, row in enumerate(result.rows) if row.params.record]
        if asked:
            self._measure(result, sampled_token_ids, asked)
        while self._size > self._max_tokens and len(self._recordings) > 1:
            _, oldest = self._recordings.popitem(last=False)
            self._size -= oldest.num_tokens * oldest.size_per_token

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
        negative = _negative_at(result, sampled_token_ids)
        alternatives = _alternatives(result, asked, base_logits, steered)
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
                recording.adapters[position].append(adapters[position][number] if result.acted[place] else None)
            if row.guidance is not None:
                recording.negative = recording.negative if recording.negative is not None else []
                recording.negative.append(negative.get(place))
            if place in alternatives:
                recording.alternatives = recording.alternatives if recording.alternatives is not None else []
                recording.alternatives.append(alternatives[place])

    def _recording(self, row: SteeredRow) -> _Recording:
        size = 1 + 2 * (row.params.num_alternatives or 0)
        return self._recordings.setdefault(row.params.uid, _Recording(size_per_token=size))

    def take(self, uids: Sequence[str]) -> list[SteeringRecord]:
        """Remove and return the records of these candidates; unknown ones are left out."""
        taken: list[SteeringRecord] = []
        for uid in uids:
            recording = self._recordings.pop(uid, None)
            if recording is None:
                continue
            self._size -= recording.num_tokens * recording.size_per_token
            taken.append(recording.record(uid))
        return taken

    def read(self, starts: Mapping[str, int]) -> list[SteeringRecord]:
        """Copies of the records of these candidates, each from a token on; they stay. Unknown ones are left out."""
        return [self._recordings[uid].record(uid, start) for uid, start in starts.items() if uid in self._recordings]


def _negative_at(result: StepResult, sampled_token_ids: Tensor) -> dict[int, float]:
    """Log-probability of the sampled token under the negative prompt, by place of the row."""
    if result.negative_logprobs is None:
        return {}
    tokens = sampled_token_ids[result.indices[torch.tensor(result.guided, device=result.indices.device)]].long()
    values: list[float] = result.negative_logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    return dict(zip(result.guided, values, strict=True))


def _alternatives(
    result: StepResult, asked: Sequence[int], base_logits: Tensor, steered_logprobs: Tensor
) -> dict[int, Alternatives]:
    """The most probable tokens before and after steering, by place; of rows of `asked` that want an explanation.

    Args:
        result: The step.
        asked: Places of the rows that are recorded.
        base_logits: `[len(asked), V]` of them.
        steered_logprobs: `[len(asked), V]` of them.
    """
    wanted = [
        (number, place, count)
        for number, place in enumerate(asked)
        if (count := result.rows[place].params.num_alternatives) is not None
    ]
    if not wanted:
        return {}
    numbers = torch.tensor([number for number, _, _ in wanted], device=base_logits.device)
    base, steered = torch.log_softmax(base_logits[numbers], dim=-1), steered_logprobs[numbers]
    most = min(max(count for _, _, count in wanted), base.shape[-1])
    sides: list[list[list[Alternative]]] = []
    for side in (base, steered):
        ids = side.topk(most, dim=-1).indices
        rows = zip(ids.tolist(), base.gather(1, ids).tolist(), steered.gather(1, ids).tolist(), strict=True)
        sides.append([[_alternative(*entry) for entry in zip(*row, strict=True)] for row in rows])
    return {
        place: Alternatives(before=before[:count], after=after[:count])
        for (_, place, count), before, after in zip(wanted, *sides, strict=True)
    }


def _alternative(token_id: int, base: float, steered: float) -> Alternative:
    return Alternative(token_id=token_id, base=_finite(base), steered=_finite(steered))


def _finite(logprob: float) -> float | None:
    return logprob if logprob > float("-inf") else None
