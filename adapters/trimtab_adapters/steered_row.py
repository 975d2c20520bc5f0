"""A request whose logits are to be steered: what was asked for, its tokens, and the terms that steer it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab_adapters.contract.params import SteeringParams
from trimtab_adapters.expert import Expert
from trimtab_adapters.kv_pool import SequenceCache


@dataclass(slots=True, eq=False)
class Term:
    """One model's part in the steering of a row.

    Attributes:
        expert: The model.
        alpha: Its weight, before any schedule.
        cache: Its keys and values for this row.
        tokens: What it reads after its own prefix: the row's own tokens, or those of another prompt with the row's
            output.
    """

    expert: Expert
    alpha: float
    cache: SequenceCache
    tokens: list[int]


@dataclass(slots=True, eq=False)
class SteeredRow:
    """A request in the batch whose logits are to be steered.

    Attributes:
        params: What was asked for.
        tokens: Prompt and output ids so far.
        num_prompt_tokens: How many of them are the prompt.
        terms: The adapter LMs with a non-zero alpha, in the order asked for.
        guidance: The base under a negative prompt; its alpha is the guidance scale minus 1.
        error: Why steering failed, None while it is well.
    """

    params: SteeringParams
    tokens: list[int]
    num_prompt_tokens: int
    terms: list[Term] = field(default_factory=list)
    guidance: Term | None = None
    error: str | None = None

    @property
    def all_terms(self) -> list[Term]:
        """Everything that has to run for this row."""
        return [*self.terms, self.guidance] if self.guidance is not None else self.terms

    @property
    def factor(self) -> float:
        """What multiplies every alpha at the next token; 0 when nothing acts on it."""
        if not self.terms and self.guidance is None:
            return 0.0
        schedule = self.params.operators.schedule
        return 1.0 if schedule is None else schedule.factor(self.num_output_tokens)

    @property
    def is_over(self) -> bool:
        """Whether the schedule has ended, so that nothing will act on this row again."""
        schedule = self.params.operators.schedule
        if schedule is None or schedule.first is None:
            return False
        return self.num_output_tokens >= schedule.start + schedule.first

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt_tokens

    def append(self, token_ids: Sequence[int]) -> None:
        """Add sampled tokens. A placeholder (negative id) marks the row as failed: it must never be steered on."""
        if any(token < 0 for token in token_ids):
            self.error = self.error or "the engine handed out placeholder token ids instead of sampled ones"
            return
        num_before = len(self.tokens)
        self.tokens.extend(token_ids)
        if self.guidance is not None:  # it reads another prompt, but the same output
            self.guidance.tokens.extend(self.tokens[max(num_before, self.num_prompt_tokens) :])
