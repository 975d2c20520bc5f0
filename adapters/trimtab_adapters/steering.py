"""The steering core: mixes adapter LMs into the logits of any rows of any step, whichever runner calls it.

A shell (one per vLLM runner) opens a `SteeredRow` when a request enters the batch, tells it which tokens exist, and
calls `SteeringCore.step` with the rows of the step. The core keeps nothing that is not a function of the row's token
ids, so a shell may close and reopen a row at any time (preemption, a step in which it is not scheduled) without harm.

A row whose steering fails is marked with the reason and left to the shell to report. The others go on.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_adapters.contract.params import SteeringParams, VersionId
from trimtab_adapters.kv_pool import PoolExhaustedError, SequenceCache
from trimtab_adapters.residents import ResidentVersion

logger = logging.getLogger(__name__)

MAX_FORWARD_TOKENS = 2048
"""Most new tokens in one packed adapter forward pass: bounds the memory of a prefill."""


@dataclass(slots=True, eq=False)
class SteeredRow:
    """A request in the batch whose logits are to be steered.

    Attributes:
        params: What was asked for.
        tokens: Prompt and output ids so far.
        num_prompt_tokens: How many of them are the prompt.
        terms: (resident version, alpha) of each term with a non-zero alpha, in the order asked for.
        caches: One per term.
        error: Why steering failed, None while it is well.
    """

    params: SteeringParams
    tokens: list[int]
    num_prompt_tokens: int
    terms: list[tuple[ResidentVersion, float]] = field(default_factory=list)
    caches: list[SequenceCache] = field(default_factory=list)
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt_tokens

    def append(self, token_ids: Sequence[int]) -> None:
        """Add sampled tokens. A placeholder (negative id) marks the row as failed: it must never be steered on."""
        if any(token < 0 for token in token_ids):
            self.error = self.error or "the engine handed out placeholder token ids instead of sampled ones"
            return
        self.tokens.extend(token_ids)


@dataclass(slots=True)
class StepResult:
    """What one step knows of its steered rows, in their order; R rows, V the width of the base's logits.

    Attributes:
        rows: The rows that were steered; those that failed are not among them.
        indices: `[R]` their rows in the step's logits.
        base_logits: `[R, V]` as the engine had them before steering, constraints applied.
        added: `[R, V]` what steering added to them.
        steered_logprobs: `[R, V]` before temperature.
        adapter_logprobs: One `[R, V]` per position in the steering; rows with fewer terms hold another's values there.
        failed: Rows whose steering failed now or before, with their row in the logits.
    """

    rows: list[SteeredRow]
    indices: Tensor
    base_logits: Tensor
    added: Tensor
    steered_logprobs: Tensor
    adapter_logprobs: list[Tensor]
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
        residents: Committed versions by id; shared with whoever loads and retires them.
        vocab_size: V, width of the base model's logits.
        max_forward_tokens: Bound on the tokens of one packed pass.
    """

    def __init__(
        self,
        residents: Mapping[VersionId, ResidentVersion],
        *,
        vocab_size: int,
        max_forward_tokens: int = MAX_FORWARD_TOKENS,
    ) -> None:
        self.residents = residents
        self.vocab_size = vocab_size
        self.max_forward_tokens = max_forward_tokens
        self.num_steps = 0
        self.num_rows = 0
        self.num_failed = 0

    def open(
        self, params: SteeringParams, prompt_token_ids: Sequence[int] | None, output_token_ids: Sequence[int]
    ) -> SteeredRow:
        """Admit a request. Never raises: what is wrong with it is in the row's `error`."""
        row = SteeredRow(params, list(prompt_token_ids or ()), len(prompt_token_ids or ()))
        if prompt_token_ids is None:
            row.error = "steering needs prompt token ids; prompt embeddings have none"
        row.append(output_token_ids)
        for weight in params.active:
            resident = self.residents.get(weight.version)
            if resident is None or not resident.is_usable:
                row.error = row.error or f"adapter version {weight.version} is not loaded in this engine"
                break
            resident.num_rows += 1
            row.terms.append((resident, weight.alpha))
            row.caches.append(SequenceCache(root=resident.cache_root))
        return row

    def close(self, row: SteeredRow) -> None:
        """Let go of what a row holds; it may be opened again with the same tokens at little cost."""
        for (resident, _), cache in zip(row.terms, row.caches, strict=True):
            resident.pool.release(cache)
            resident.num_rows -= 1
        row.terms.clear()
        row.caches.clear()

    def prefill(self, rows: Sequence[tuple[SteeredRow, int]]) -> None:
        """Let adapter LMs read what the base has read of prompts that are still in chunked prefill.

        So the work of a long prompt is spread over as many steps as the base takes, instead of making all rows of the
        batch wait when it is needed. Never raises: what could not be done here is done, or fails, in `step`.

        Args:
            rows: Open rows, each with the number of its tokens that the base has computed.
        """
        groups: dict[VersionId, tuple[ResidentVersion, list[tuple[SequenceCache, list[int]]]]] = {}
        for row, num_tokens in rows:
            if row.error is not None or num_tokens <= 0:
                continue
            for (resident, _), cache in zip(row.terms, row.caches, strict=True):
                group = groups.setdefault(resident.version, (resident, []))
                group[1].append((cache, row.tokens[:num_tokens]))
        for resident, members in groups.values():
            caches = [cache for cache, _ in members]
            try:
                resident.prefill(caches, [tokens for _, tokens in members], max_tokens=self.max_forward_tokens)
            except Exception:  # an exception that leaves a processor kills the engine for good
                logger.exception("adapter version %s failed while reading a prompt ahead", resident.version)
                for cache in caches:
                    resident.pool.discard(cache)

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
        by_version = self._forward_all([row for row, _ in rows if row.error is None])
        good = [(row, index) for row, index in rows if row.error is None]
        failed = [(row, index) for row, index in rows if row.error is not None]
        self.num_failed += len(failed)
        steered_rows = [row for row, _ in good]
        indices = torch.tensor([index for _, index in good], dtype=torch.long, device=logits.device)
        is_prefix = steered_rows and [index for _, index in good] == list(range(len(good)))
        base = logits[: len(good)].clone() if is_prefix else logits[indices]
        terms = self._terms(steered_rows, by_version)
        added = mixing.steering_term(terms) if terms else torch.zeros_like(base)
        steered = base + added
        if is_prefix:
            logits[: len(good)] = steered
        else:
            logits[indices] = steered
        return StepResult(
            rows=steered_rows,
            indices=indices,
            base_logits=base,
            added=added,
            steered_logprobs=torch.log_softmax(steered, dim=-1),
            adapter_logprobs=[logprobs for _, logprobs in terms],
            failed=failed,
        )

    def _terms(
        self, rows: Sequence[SteeredRow], by_version: Mapping[VersionId, "_Table"]
    ) -> list[tuple[float | Tensor, Tensor]]:
        """(alpha, log-probabilities `[R, V]`) for each position in the steering; alpha is `[R, 1]` or the same in all.

        Terms stay in the order asked for, so that a row's sum does not depend on its neighbours. A row with fewer
        terms than others gets alpha 0 for the rest.
        """
        terms: list[tuple[float | Tensor, Tensor]] = []
        for position in range(max((len(row.terms) for row in rows), default=0)):
            alphas: list[float] = []
            places: list[tuple[VersionId, int]] = []
            for row in rows:
                has_term = position < len(row.terms)
                resident, alpha = row.terms[position] if has_term else row.terms[0]
                alphas.append(alpha if has_term else 0.0)
                places.append((resident.version, by_version[resident.version].places[id(row)]))
            logprobs = _gather_rows(by_version, places)
            if len(set(alphas)) == 1:
                terms.append((alphas[0], logprobs))
            else:
                terms.append((torch.tensor(alphas, dtype=logprobs.dtype, device=logprobs.device)[:, None], logprobs))
        return terms

    def _forward_all(self, rows: Sequence[SteeredRow]) -> dict[VersionId, "_Table"]:
        """Adapter log-probabilities of each version over its rows. Rows that fail here get their `error`."""
        groups: dict[VersionId, list[tuple[SteeredRow, SequenceCache]]] = {}
        residents: dict[VersionId, ResidentVersion] = {}
        for row in rows:
            for (resident, _), cache in zip(row.terms, row.caches, strict=True):
                groups.setdefault(resident.version, []).append((row, cache))
                residents[resident.version] = resident
        tables: dict[VersionId, _Table] = {}
        for version, members in groups.items():
            alive = [(row, cache) for row, cache in members if row.error is None]
            if not alive:
                continue
            pool = residents[version].pool
            victims = [
                cache
                for other, group in groups.items()
                if other != version and residents[other].pool is pool
                for _, cache in group
            ]
            table = self._forward_version(residents[version], alive, victims)
            if table is not None:
                tables[version] = table
        return tables

    def _forward_version(
        self,
        resident: ResidentVersion,
        members: Sequence[tuple[SteeredRow, SequenceCache]],
        victims: Sequence[SequenceCache],
    ) -> "_Table | None":
        """One adapter version over all its rows; None when it failed and the rows are marked.

        A row that fits no pool fails alone: the others are tried again without it.
        """
        try:
            logits = resident.next_token_logits(
                [cache for _, cache in members],
                [row.tokens for row, _ in members],
                max_tokens=self.max_forward_tokens,
                victims=victims,
            )
            logprobs = mixing.adapter_logprobs(logits, vocab_size=self.vocab_size, num_known=resident.num_known)
            is_finite = torch.isfinite(logprobs.amin(dim=-1)).tolist()
        except PoolExhaustedError as exc:
            misfits = members if exc.place is None else [members[exc.place]]
            _fail(resident, misfits, f"out of adapter KV cache: {exc}")
            rest = [member for member in members if member[0].error is None]
            return self._forward_version(resident, rest, victims) if rest else None
        except Exception as exc:  # an exception that leaves a processor kills the engine for good
            logger.exception("adapter version %s failed in a forward pass", resident.version)
            _fail(resident, members, f"adapter version {resident.version} failed: {type(exc).__name__}")
            return None
        broken = [member for member, fine in zip(members, is_finite, strict=True) if not fine]
        _fail(resident, broken, f"adapter version {resident.version} produced NaN or infinite logits")
        return _Table(logprobs, {id(row): place for place, (row, _) in enumerate(members)})


@dataclass(frozen=True, slots=True)
class _Table:
    """Log-probabilities `[rows, V]` of one version, and each row's place by the identity of its object."""

    logprobs: Tensor
    places: dict[int, int]


def _gather_rows(tables: Mapping[VersionId, "_Table"], places: Sequence[tuple[VersionId, int]]) -> Tensor:
    """`[R, V]` rows of several tables, in the order of `places`. The usual case, one whole table, copies nothing."""
    versions = {version for version, _ in places}
    indices = [place for _, place in places]
    if len(versions) == 1:
        table = tables[places[0][0]].logprobs
        if indices == list(range(table.shape[0])):
            return table
        return table[torch.tensor(indices, device=table.device)]
    return torch.stack([tables[version].logprobs[place] for version, place in places])


def _fail(resident: ResidentVersion, members: Sequence[tuple[SteeredRow, SequenceCache]], reason: str) -> None:
    for row, cache in members:
        row.error = reason
        resident.pool.discard(cache)
