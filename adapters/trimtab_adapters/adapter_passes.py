"""The adapter LMs' part of a step: each LM runs once over all rows that it steers, whichever LoRAs on it they use.

A row whose forward pass fails gets its `error` and its blocks are thrown away. The others go on; those of other LoRAs
that were in the same pass are computed again without it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.kv_pool import PoolExhaustedError, SequenceCache
from trimtab_adapters.lora_lm import LoraLM, forward_together
from trimtab_adapters.packed_rows import PackedRow, PackedRows
from trimtab_adapters.steered_row import SteeredRow, Term

logger = logging.getLogger(__name__)

MAX_FORWARD_TOKENS = 2048
"""Most new tokens in one packed adapter forward pass: bounds the memory of a prefill."""

Member = tuple[SteeredRow, Term]
"""A row and the term of it that a version computes."""
T = TypeVar("T")


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
        groups: dict[int, list[tuple[Term, list[int]]]] = {}
        for term, tokens in members:
            groups.setdefault(id(term.expert.adapter.trunk), []).append((term, tokens))
        for group in groups.values():
            self._prefill_group(group)

    def _prefill_group(self, group: Sequence[tuple[Term, list[int]]]) -> None:
        """Rows of one LM. Of several LoRAs on it that fail together, each is tried alone."""
        try:
            self._packed(group).prefill()
        except Exception:  # an exception that leaves a processor kills the engine for good
            apart = _by_version(group, lambda member: member[0].expert.version)
            logger.exception("adapter version %s failed while reading a prompt ahead", ", ".join(apart))
            for term, _ in group:
                term.expert.pool.discard(term.cache)
            if len(apart) > 1:
                for part in apart.values():
                    self._prefill_group(part)

    def run(self, members: Sequence[Member], bystanders: Sequence[Term] = ()) -> dict[VersionId, LogprobTable]:
        """Next-token log-probabilities of each version over its rows. Rows that fail here get their `error`.

        Args:
            members: Rows and terms to compute.
            bystanders: Terms of open rows that are not computed now. When a pool is full, theirs is the first cache
                that is given up; else a prompt that was read ahead would make rows fail that are due.
        """
        groups: dict[int, list[Member]] = {}
        for row, term in members:
            groups.setdefault(id(term.expert.adapter.trunk), []).append((row, term))
        tables: dict[VersionId, LogprobTable] = {}
        for trunk, group in groups.items():
            alive = [member for member in group if member[0].error is None]
            if not alive:
                continue
            pool = group[0][1].expert.pool
            victims = [term.cache for term in bystanders if term.expert.pool is pool]
            victims += [
                term.cache
                for other, others in groups.items()
                if other != trunk and others[0][1].expert.pool is pool
                for _, term in others
            ]
            tables |= self._run_group(alive, victims)
        return tables

    def _run_group(self, members: Sequence[Member], victims: Sequence[SequenceCache]) -> dict[VersionId, LogprobTable]:
        """One LM over all its rows, each with the LoRA of its version; without the versions that failed altogether.

        A row that fits no pool fails alone: the others are tried again without it.
        """
        versions = _by_version(members, lambda member: member[1].expert.version)
        names = ", ".join(versions)
        started = time.perf_counter()
        try:
            logits = self._packed([(term, term.tokens) for _, term in members]).next_token_logits(victims)
            num_known = members[0][1].expert.num_known  # the same for all LoRAs on a LM
            logprobs = mixing.adapter_logprobs(logits, vocab_size=self.vocab_size, num_known=num_known)
            is_finite = torch.isfinite(logprobs.amin(dim=-1)).tolist()
        except PoolExhaustedError as exc:
            misfits = members if exc.place is None else [members[exc.place]]
            _fail(misfits, f"out of adapter KV cache: {exc}")
            rest = [member for member in members if member[0].error is None]
            return self._run_group(rest, victims) if rest else {}
        except Exception as exc:  # an exception that leaves a processor kills the engine for good
            logger.exception("adapter version %s failed in a forward pass", names)
            if len(versions) > 1:
                return self._run_apart(versions, members, victims)
            _fail(members, f"adapter version {names} failed: {type(exc).__name__}")
            return {}
        broken = [member for member, fine in zip(members, is_finite, strict=True) if not fine]
        if len({term.expert.version for _, term in broken}) > 1:  # perhaps the fault of one alone
            logger.error("NaN or infinite logits in a forward pass of %s", names)
            return self._run_apart(versions, broken, victims)
        seconds = time.perf_counter() - started
        for group in versions.values():
            group[0][1].expert.activity.add(len(group), seconds * len(group) / len(members))
        for member in broken:
            _fail([member], f"adapter version {member[1].expert.version} produced NaN or infinite logits")
        tables = {version: LogprobTable(logprobs, {}) for version in versions}
        for place, (row, term) in enumerate(members):
            tables[term.expert.version].places[id(row)] = place
        return tables

    def _run_apart(
        self, versions: Mapping[VersionId, Sequence[Member]], spoilt: Sequence[Member], victims: Sequence[SequenceCache]
    ) -> dict[VersionId, LogprobTable]:
        """Versions that failed together, one by one, so that only those fail that are to blame.

        Args:
            versions: The rows of each.
            spoilt: Those whose keys and values may be garbage.
            victims: As for `_run_group`.
        """
        for _, term in spoilt:
            term.expert.pool.discard(term.cache)
        tables: dict[VersionId, LogprobTable] = {}
        for version, group in versions.items():
            alive = [member for member in group if member[0].error is None]
            others = [term.cache for other, part in versions.items() if other != version for _, term in part]
            if alive:
                tables |= self._run_group(alive, [*victims, *others])
        return tables

    def _packed(self, group: Sequence[tuple[Term, list[int]]]) -> PackedRows:
        """Rows of one LM, of one version or of several LoRAs on it."""
        first = group[0][0].expert

        def run(numbers: Sequence[int], counts: Sequence[int], done: Sequence[int] | None) -> Tensor:
            batch = first.adapter.batch(first.pool, [group[number][0].cache for number in numbers], counts)
            adapters = [group[number][0].expert.adapter for number in numbers]
            loras = [adapter for adapter in adapters if isinstance(adapter, LoraLM)]
            if len(loras) < len(adapters):
                return first.adapter.forward(batch, done)
            return forward_together(loras, batch, done)

        rows = [PackedRow(term.cache, term.expert.prefix, tokens) for term, tokens in group]
        return PackedRows(first.pool, rows, run, self.max_forward_tokens)


def gather_rows(tables: Mapping[VersionId, LogprobTable], places: Sequence[tuple[VersionId, int]]) -> Tensor:
    """`[R, V]` rows of several tables, in the order of `places`. The usual case, one whole table, copies nothing."""
    first = tables[places[0][0]].logprobs
    indices = [place for _, place in places]
    if all(tables[version].logprobs is first for version, _ in places):
        if indices == list(range(first.shape[0])):
            return first
        return first[torch.tensor(indices, device=first.device)]
    return torch.stack([tables[version].logprobs[place] for version, place in places])


def _by_version(members: Sequence[T], version_of: Callable[[T], VersionId]) -> dict[VersionId, list[T]]:
    groups: dict[VersionId, list[T]] = {}
    for member in members:
        groups.setdefault(version_of(member), []).append(member)
    return groups


def _fail(members: Sequence[Member], reason: str) -> None:
    for row, term in members:
        row.error = reason
        term.expert.pool.discard(term.cache)
