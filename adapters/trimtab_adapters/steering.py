"""The steering core: mixes adapter LMs into the logits of any rows of any step, whichever runner calls it.

A shell (one per vLLM runner) opens a `SteeredRow` when a request enters the batch, tells it which tokens exist, and
calls `SteeringCore.step` with the rows of the step. The core keeps nothing that is not a function of the row's token
ids, so a shell may close and reopen a row at any time (preemption, a step in which it is not scheduled) without harm.

A row whose steering fails is marked with the reason and left to the shell to report. The others go on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab_adapters import mixing, operators
from trimtab_adapters.adapter_passes import MAX_FORWARD_TOKENS, AdapterPasses, LogprobTable, gather_rows
from trimtab_adapters.contract.errors import AdapterError
from trimtab_adapters.contract.params import Guidance, SteeringParams, VersionId
from trimtab_adapters.expert import Expert
from trimtab_adapters.kv_pool import PoolExhaustedError, SequenceCache
from trimtab_adapters.steered_row import SteeredRow, Term

__all__ = ["SteeredRow", "SteeringCore", "StepResult"]


@dataclass(slots=True)
class StepResult:
    """What one step knows of its steered rows, in their order; R rows, V the width of the base's logits.

    Attributes:
        rows: The rows that were steered; those that failed are not among them.
        indices: `[R]` their rows in the step's logits.
        base_logits: `[R, V]` as the engine had them before steering, constraints applied.
        added: `[R, V]` what steering added to them, finite; the plausibility mask comes on top.
        steered_logprobs: `[R, V]` before temperature.
        adapter_logprobs: One `[R, V]` per position in the steering; rows with fewer terms, and rows on which nothing
            acted, hold another's values there.
        acted: For each row whether anything acted on it: False outside its schedule.
        guided: The rows with a negative prompt that acted, as places in `rows`.
        negative_logprobs: `[len(guided), V]` the base's own under the negative prompts.
        failed: Rows whose steering failed now or before, with their row in the logits.
    """

    rows: list[SteeredRow]
    indices: Tensor
    base_logits: Tensor
    added: Tensor
    steered_logprobs: Tensor
    adapter_logprobs: list[Tensor]
    acted: list[bool]
    guided: list[int]
    negative_logprobs: Tensor | None
    failed: list[tuple[SteeredRow, int]]

    def fail_all(self, reason: str) -> None:
        """Turn every steered row of the step into a failed one."""
        for row, index in zip(self.rows, self.indices.tolist(), strict=True):
            row.error = row.error or reason
            self.failed.append((row, index))
        self.rows = []


class SteeringCore:
    """Steers rows with the versions that are resident.

    Args:
        experts: Committed versions by id; shared with whoever loads and retires them.
        vocab_size: V, width of the base model's logits.
        max_forward_tokens: Bound on the tokens of one packed pass.
        base_expert: The base model as an expert under another prompt; raises `AdapterError` where it cannot be one.
    """

    def __init__(
        self,
        experts: Mapping[VersionId, Expert],
        *,
        vocab_size: int,
        max_forward_tokens: int = MAX_FORWARD_TOKENS,
        base_expert: Callable[[], Expert] | None = None,
    ) -> None:
        self.experts = experts
        self.base_expert = base_expert
        self.passes = AdapterPasses(vocab_size=vocab_size, max_forward_tokens=max_forward_tokens)
        self.num_steps = 0
        self.num_rows = 0
        self.num_failed = 0
        self._open: dict[int, SteeredRow] = {}

    def open(
        self,
        params: SteeringParams,
        prompt_token_ids: Sequence[int] | None,
        output_token_ids: Sequence[int],
        *,
        num_prompt_tokens: int | None = None,
    ) -> SteeredRow:
        """Admit a request. Never raises: what is wrong with it is in the row's `error`.

        Args:
            params: What was asked for.
            prompt_token_ids: The prompt as far as it is known; None where there are no ids.
            output_token_ids: What was sampled before.
            num_prompt_tokens: Length of a prompt whose ids come later, with `SteeredRow.append`.
        """
        prompt = list(prompt_token_ids or ())
        row = SteeredRow(params, prompt, len(prompt) if num_prompt_tokens is None else num_prompt_tokens)
        if prompt_token_ids is None:
            row.error = "steering needs prompt token ids; prompt embeddings have none"
        row.append(output_token_ids)
        for weight in params.active:
            expert = self.experts.get(weight.version)
            if expert is None or not expert.is_usable:
                row.error = row.error or f"adapter version {weight.version} is not loaded in this engine"
                break
            expert.num_rows += 1
            row.terms.append(Term(expert, weight.alpha, SequenceCache(root=expert.cache_root), row.tokens))
        if params.guidance is not None and params.guidance.scale != 1.0 and row.error is None:
            self._guide(row, params.guidance)
        self._open[id(row)] = row
        return row

    def _guide(self, row: SteeredRow, guidance: Guidance) -> None:
        try:
            if self.base_expert is None:
                raise AdapterError("this engine's base model cannot be its own expert, which a negative prompt needs")
            expert = self.base_expert()
        except (AdapterError, PoolExhaustedError) as exc:
            row.error = str(exc)
            return
        expert.num_rows += 1
        tokens = [*guidance.token_ids, *row.tokens[row.num_prompt_tokens :]]
        row.guidance = Term(expert, guidance.scale - 1.0, SequenceCache(root=expert.cache_root), tokens)

    def close(self, row: SteeredRow) -> None:
        """Let go of what a row holds; it may be opened again with the same tokens at little cost."""
        self._open.pop(id(row), None)
        for term in row.all_terms:
            term.expert.pool.release(term.cache)
            term.expert.num_rows -= 1
        row.terms.clear()
        row.guidance = None

    def prefill(self, rows: Sequence[tuple[SteeredRow, int]]) -> None:
        """Let adapter LMs read what the base has read of prompts that are still in chunked prefill.

        So the work of a long prompt is spread over as many steps as the base takes, instead of making all rows of the
        batch wait when it is needed. Never raises: what could not be done here is done, or fails, in `step`.

        Args:
            rows: Open rows, each with the number of its tokens that the base has computed.
        """
        self.passes.prefill(
            [
                (term, term.tokens[:num_tokens])
                for row, num_tokens in rows
                if row.error is None and num_tokens > 0 and not row.is_over
                for term in row.all_terms
            ]
        )

    def step(self, rows: Sequence[tuple[SteeredRow, int]], logits: Tensor) -> StepResult | None:
        """Steer some rows of a step's logits in place.

        Args:
            rows: Open rows with their indices in `logits`; their tokens are complete up to the last one.
            logits: `[num_rows, V]` float32 base logits; the named rows are overwritten by steered ones.

        Returns:
            None when no row needed anything.
        """
        if not rows:
            return None
        self.num_steps += 1
        self.num_rows += len(rows)
        factors = {id(row): row.factor for row, _ in rows if row.error is None}
        acting = [row for row, _ in rows if row.error is None and factors[id(row)]]
        keys = {id(row) for row in acting}
        bystanders = [term for key, row in self._open.items() if key not in keys for term in row.all_terms]
        tables = self.passes.run([(row, term) for row in acting for term in row.all_terms], bystanders)
        good = [(row, index) for row, index in rows if row.error is None]
        failed = [(row, index) for row, index in rows if row.error is not None]
        self.num_failed += len(failed)
        steered_rows = [row for row, _ in good]
        indices = torch.tensor([index for _, index in good], dtype=torch.long, device=logits.device)
        is_prefix = steered_rows and [index for _, index in good] == list(range(len(good)))
        base = logits[: len(good)].clone() if is_prefix else logits[indices]
        row_factors = [factors[id(row)] for row in steered_rows]
        terms = _terms(steered_rows, row_factors, tables)
        added = mixing.steering_term(terms) if terms else torch.zeros_like(base)
        added, guided, negative = _guided(steered_rows, row_factors, tables, base, added)
        added, steered = _operated(steered_rows, row_factors, base, added)
        if is_prefix:
            logits[: len(good)] = steered
        else:
            logits[indices] = steered
        for row in steered_rows:
            if row.is_over:
                _release(row)
        return StepResult(
            rows=steered_rows,
            indices=indices,
            base_logits=base,
            added=added,
            steered_logprobs=torch.log_softmax(steered, dim=-1),
            adapter_logprobs=[logprobs for _, logprobs in terms],
            acted=[factor != 0.0 for factor in row_factors],
            guided=guided,
            negative_logprobs=negative,
            failed=failed,
        )


def _release(row: SteeredRow) -> None:
    """Give the blocks of a row back that nothing will act on again. It keeps its versions to its last token."""
    for term in row.all_terms:
        if term.cache.tokens:
            term.expert.pool.release(term.cache)


def _terms(
    rows: Sequence[SteeredRow], factors: Sequence[float], tables: Mapping[VersionId, LogprobTable]
) -> list[tuple[float | Tensor, Tensor]]:
    """(alpha, log-probabilities `[R, V]`) for each position in the steering; alpha is `[R, 1]` or the same in all.

    Terms stay in the order asked for, so that a row's sum does not depend on its neighbours. A row with fewer terms
    than others, or on which nothing acts, gets alpha 0 for the rest.
    """
    acting = [row for row, factor in zip(rows, factors, strict=True) if factor]
    if not acting:
        return []
    # Finite, unlike other rows of the tables: 0 times NaN is NaN.
    filler = _place(acting[0], acting[0].all_terms[0], tables)
    terms: list[tuple[float | Tensor, Tensor]] = []
    for position in range(max(len(row.terms) for row in acting)):
        alphas: list[float] = []
        places: list[tuple[VersionId, int]] = []
        for row, factor in zip(rows, factors, strict=True):
            if factor and position < len(row.terms):
                alphas.append(row.terms[position].alpha * factor)
                places.append(_place(row, row.terms[position], tables))
            else:
                alphas.append(0.0)
                places.append(filler)
        logprobs = gather_rows(tables, places)
        if len(set(alphas)) == 1:
            terms.append((alphas[0], logprobs))
        else:
            terms.append((torch.tensor(alphas, dtype=logprobs.dtype, device=logprobs.device)[:, None], logprobs))
    return terms


def _place(row: SteeredRow, term: Term, tables: Mapping[VersionId, LogprobTable]) -> tuple[VersionId, int]:
    """Where the log-probabilities of a row's term are."""
    version = term.expert.version
    return version, tables[version].places[id(row)]


def _guided(
    rows: Sequence[SteeredRow],
    factors: Sequence[float],
    tables: Mapping[VersionId, LogprobTable],
    base: Tensor,
    added: Tensor,
) -> tuple[Tensor, list[int], Tensor | None]:
    """Add what guidance adds; also its rows, as places, and their negative log-probabilities."""
    found = [
        (place, row.guidance.alpha * factor, _place(row, row.guidance, tables))
        for place, (row, factor) in enumerate(zip(rows, factors, strict=True))
        if factor and row.guidance is not None
    ]
    if not found:
        return added, [], None
    guided = [place for place, _, _ in found]
    places = torch.tensor(guided, device=base.device)
    negative = gather_rows(tables, [source for _, _, source in found])
    strength = _column([strength for _, strength, _ in found], base)
    guidance = operators.guidance_term(base[places], negative, strength)
    # Out of place: `added` may be the very table that the record reads.
    return added.index_add(0, places, guidance), guided, negative


def _operated(
    rows: Sequence[SteeredRow], factors: Sequence[float], base: Tensor, added: Tensor
) -> tuple[Tensor, Tensor]:
    """What is added after the operators, and the steered logits; both `[R, V]`."""
    asked = [
        (place, row.params.operators)
        for place, (row, factor) in enumerate(zip(rows, factors, strict=True))
        if factor and (row.params.operators.plausibility is not None or row.params.operators.max_kl is not None)
    ]
    if not asked:
        return added, base + added
    places = torch.tensor([place for place, _ in asked], device=base.device)
    some_base, some_added = base[places], added[places]
    fractions = [operator.plausibility for _, operator in asked]
    mask = None
    if any(fraction is not None for fraction in fractions):
        mask = operators.implausible(some_base, _column([fraction or 0.0 for fraction in fractions], base))
        some_base = some_base.masked_fill(mask, -torch.inf)
    caps = [operator.max_kl for _, operator in asked]
    if any(cap is not None for cap in caps):
        some_added = some_added * operators.capped_scale(
            some_base, some_added, _column([math.inf if cap is None else cap for cap in caps], base)
        )
        added = added.index_copy(0, places, some_added)
    steered = (base + added).index_copy_(0, places, some_base + some_added)
    return added, steered


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """`[R, 1]` numbers, one a row."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
