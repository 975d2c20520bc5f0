"""The adapter LMs' part of a step: each version runs once over all rows that it steers.

A row whose forward pass fails gets its `error` and its blocks are thrown away. The others go on.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.kv_pool import PoolExhaustedError, SequenceCache
from trimtab_adapters.residents import ResidentVersion
from trimtab_adapters.steered_row import SteeredRow, Term

logger = logging.getLogger(__name__)

MAX_FORWARD_TOKENS = 2048
"""Most new tokens in one packed adapter forward pass: bounds the memory of a prefill."""

Member = tuple[SteeredRow, Term]
"""A row and the term of it that a version computes."""


@dataclass(frozen=True, slots=True)
class LogprobTable:
    """Log-probabilities `[rows, V]` of one version, and each row's place by the identity of its object."""

    logprobs: Tensor
    places: dict[int, int]


class AdapterPasses:
    """Runs adapter LMs over rows.

    Args:
        vocab_size: V, width of the base model's logits.
        max_forward_tokens: Bound on the tokens of one packed pass.
    """

    def __init__(self, *, vocab_size: int, max_forward_tokens: int = MAX_FORWARD_TOKENS) -> None:
        self.vocab_size = vocab_size
        self.max_forward_tokens = max_forward_tokens

    def prefill(self, members: Sequence[tuple[Term, list[int]]]) -> None:
        """Let adapter LMs read these tokens ahead of need. Never raises: what fails here is tried again by `run`."""
        groups: dict[VersionId, list[tuple[Term, list[int]]]] = {}
        for term, tokens in members:
            groups.setdefault(term.resident.version, []).append((term, tokens))
        for version, group in groups.items():
            resident = group[0][0].resident
            caches = [term.cache for term, _ in group]
            try:
                resident.prefill(caches, [tokens for _, tokens in group], max_tokens=self.max_forward_tokens)
            except Exception:  # an exception that leaves a processor kills the engine for good
                logger.exception("adapter version %s failed while reading a prompt ahead", version)
                for cache in caches:
                    resident.pool.discard(cache)

    def run(self, members: Sequence[Member], bystanders: Sequence[Term] = ()) -> dict[VersionId, LogprobTable]:
        """Next-token log-probabilities of each version over its rows. Rows that fail here get their `error`.

        Args:
            members: Rows and terms to compute.
            bystanders: Terms of open rows that are not computed now. When a pool is full, theirs is the first cache
                that is given up; else a prompt that was read ahead would make rows fail that are due.
        """
        groups: dict[VersionId, list[Member]] = {}
        for row, term in members:
            groups.setdefault(term.resident.version, []).append((row, term))
        tables: dict[VersionId, LogprobTable] = {}
        for version, group in groups.items():
            alive = [member for member in group if member[0].error is None]
            if not alive:
                continue
            resident = group[0][1].resident
            victims = [term.cache for term in bystanders if term.resident.pool is resident.pool]
            victims += [
                term.cache
                for other, others in groups.items()
                if other != version and others[0][1].resident.pool is resident.pool
                for _, term in others
            ]
            table = self._run_version(resident, alive, victims)
            if table is not None:
                tables[version] = table
        return tables

    def _run_version(
        self, resident: ResidentVersion, members: Sequence[Member], victims: Sequence[SequenceCache]
    ) -> LogprobTable | None:
        """One version over all its rows; None when it failed and the rows are marked.

        A row that fits no pool fails alone: the others are tried again without it.
        """
        started = time.perf_counter()
        try:
            logits = resident.next_token_logits(
                [term.cache for _, term in members],
                [term.tokens for _, term in members],
                max_tokens=self.max_forward_tokens,
                victims=victims,
            )
            logprobs = mixing.adapter_logprobs(logits, vocab_size=self.vocab_size, num_known=resident.num_known)
            is_finite = torch.isfinite(logprobs.amin(dim=-1)).tolist()
        except PoolExhaustedError as exc:
            misfits = members if exc.place is None else [members[exc.place]]
            _fail(misfits, f"out of adapter KV cache: {exc}")
            rest = [member for member in members if member[0].error is None]
            return self._run_version(resident, rest, victims) if rest else None
        except Exception as exc:  # an exception that leaves a processor kills the engine for good
            logger.exception("adapter version %s failed in a forward pass", resident.version)
            _fail(members, f"adapter version {resident.version} failed: {type(exc).__name__}")
            return None
        resident.activity.add(len(members), time.perf_counter() - started)
        broken = [member for member, fine in zip(members, is_finite, strict=True) if not fine]
        _fail(broken, f"adapter version {resident.version} produced NaN or infinite logits")
        return LogprobTable(logprobs, {id(row): place for place, (row, _) in enumerate(members)})


def gather_rows(tables: Mapping[VersionId, LogprobTable], places: Sequence[tuple[VersionId, int]]) -> Tensor:
    """`[R, V]` rows of several tables, in the order of `places`. The usual case, one whole table, copies nothing."""
    versions = {version for version, _ in places}
    indices = [place for _, place in places]
    if len(versions) == 1:
        table = tables[places[0][0]].logprobs
        if indices == list(range(table.shape[0])):
            return table
        return table[torch.tensor(indices, device=table.device)]
    return torch.stack([tables[version].logprobs[place] for version, place in places])


def _fail(members: Sequence[Member], reason: str) -> None:
    for row, term in members:
        row.error = reason
        term.resident.pool.discard(term.cache)
