"""Whether answers are what plain Hugging Face models would have said, read along the answers' own tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_models import NUM_TOKENS

TOLERANCE = 1e-4
"""Of log-probabilities. Float32 sums in another order differ by about 1e-5, a wrong token or position by whole nats."""
_BATCH = 16


@dataclass(frozen=True)
class Expert:
    """Where the weights of an adapter version lie, and its prefix."""

    directory: str
    prefix: tuple[int, ...] = ()


@dataclass
class Answer:
    """One choice with what is needed to ask for it again.

    Attributes:
        request: Number of the request and its body.
        prompt: Its token ids.
        tokens: Generated ids.
        terms: (version, alpha) that steered it.
        record: The choice's `steering_logprobs`, None where they were not asked for.
    """

    request: str
    prompt: list[int]
    tokens: list[int]
    terms: list[tuple[str, float]]
    record: dict[str, Any] | None


@dataclass
class AnswerReference:
    """Every model in float32 with its own attention and no cache, over whole sequences.

    Args:
        base: Directory of the base model.
        experts: By version.
    """

    base: str
    experts: Mapping[str, Expert]
    num_tokens: int = 0
    num_ties: int = 0
    _models: dict[str, Any] = field(default_factory=dict)

    def check(self, answers: Sequence[Answer]) -> None:
        """Every token is the greedy choice and every recorded value is right.

        Raises:
            AssertionError: Which answer is wrong, and how to ask for it again.
        """
        for start in range(0, len(answers), _BATCH):
            batch = answers[start : start + _BATCH]
            base = self._logprobs(Expert(self.base), batch)
            versions = {version for answer in batch for version, _ in answer.terms}
            tables = {
                version: self._logprobs(self.experts[version], [a for a in batch if version in dict(a.terms)])
                for version in sorted(versions)
            }
            for answer in batch:
                adapters = [tables[version][id(answer)] for version, _ in answer.terms]
                try:
                    self._check(answer, base[id(answer)], adapters)
                except AssertionError as exc:
                    raise AssertionError(f"{exc}\nanswer to {answer.request}: {answer.tokens}") from exc

    @torch.inference_mode()
    def _logprobs(self, expert: Expert, answers: Iterable[Answer]) -> dict[int, Tensor]:
        """`[tokens, V]` for each answer: the next-token log-probabilities that its tokens were chosen from."""
        if expert.directory not in self._models:
            model = AutoModelForCausalLM.from_pretrained(expert.directory, dtype=torch.float32)
            self._models[expert.directory] = model
        chosen = list(answers)
        rows = [[*expert.prefix, *answer.prompt, *answer.tokens[:-1]] for answer in chosen]
        width = max(len(row) for row in rows)
        # Nothing looks at the padding: attention is causal.
        logits = self._models[expert.directory](torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits
        tables: dict[int, Tensor] = {}
        for answer, row, row_logits in zip(chosen, rows, logits, strict=True):
            table = row_logits[len(row) - len(answer.tokens) : len(row), :NUM_TOKENS]
            tables[id(answer)] = torch.log_softmax(table, dim=-1)
        return tables

    def _check(self, answer: Answer, base: Tensor, adapters: Sequence[Tensor]) -> None:
        moved = sum((alpha * table for (_, alpha), table in zip(answer.terms, adapters, strict=True)), start=base)
        steered = torch.log_softmax(moved, dim=-1)
        column = torch.tensor(answer.tokens)[:, None]
        at_token = steered.gather(1, column)[:, 0]
        gap = steered.amax(dim=-1) - at_token
        is_other = gap > 0
        assert float(gap.max()) < TOLERANCE, f"token {int(gap.argmax())} is {float(gap.max()):.4f} nats from the best"
        self.num_tokens += len(answer.tokens)
        self.num_ties += int(is_other.sum())
        record = answer.record
        if record is None:
            return
        assert record["token_ids"] == answer.tokens
        kl = (steered.exp() * (steered - base)).sum(dim=-1)
        _assert_close("base", record["base"], base.gather(1, column)[:, 0])
        _assert_close("steered", record["steered"], at_token)
        _assert_close("kl", record["kl"], kl)
        assert len(record["adapter"]) == len(adapters)
        for values, table in zip(record["adapter"], adapters, strict=True):
            _assert_close("adapter", values, table.gather(1, column)[:, 0])


def _assert_close(name: str, got: Sequence[float], want: Tensor) -> None:
    assert len(got) == len(want), f"{len(got)} values of {name} for {len(want)} tokens"
    error = (torch.tensor(got) - want).abs()
    assert float(error.max()) < TOLERANCE, f"{name} is {float(error.max()):.2g} wrong at token {int(error.argmax())}"
