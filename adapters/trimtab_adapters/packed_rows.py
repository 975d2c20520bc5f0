"""Rows brought up to date in as few packed forward passes as fit: which tokens of which row, when the pool is full.

It knows caches and tokens, not models: who runs a pass is handed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab_adapters.kv_pool import KvPool, PoolExhaustedError, SequenceCache

RunPass = Callable[[Sequence[int], Sequence[int], Sequence[int] | None], Tensor]
"""Runs these rows, already extended by so many tokens each; returns logits of the rows at these places of the first
argument, of all where they are None."""


@dataclass(slots=True)
class PackedRow:
    """A row and what it is to be brought to: its model's prefix, then its tokens."""

    cache: SequenceCache
    prefix: list[int]
    tokens: list[int]


class PackedRows:
    """Rows of one pool that can run in one pass.

    Args:
        pool: Holds their keys and values.
        rows: The rows.
        run: Runs some of them.
        max_tokens: Most new tokens in one pass.
    """

    def __init__(self, pool: KvPool, rows: Sequence[PackedRow], run: RunPass, max_tokens: int) -> None:
        self._pool = pool
        self._rows = rows
        self._run = run
        self._max_tokens = max_tokens
        self._pending: list[list[int]] = []

    def next_token_logits(self, victims: Sequence[SequenceCache] = ()) -> Tensor:
        """Next-token logits of rows whose caches may be anywhere behind their tokens, `[rows, A]`.

        Each cache is brought to prefix + tokens: what it already holds is kept, what is missing is computed, many rows
        in one pass. When the pool is full, rows that are done with this step and `victims` (other rows' caches in the
        same pool) give up theirs and compute them anew at their next step: slow, but right.

        Raises:
            PoolExhaustedError: Not even one row alone fits; caches of the rows named may be partly advanced.
        """
        self._pending = [self._missing(row) for row in self._rows]
        logits: list[Tensor | None] = [None] * len(self._rows)
        waiting = list(range(len(self._rows)))
        while waiting:
            packed, counts, finished = self._pack(waiting)
            if not packed:
                self._make_room(waiting, victims)
                continue
            done = [place for place, number in enumerate(packed) if number in finished]
            result = self._run(packed, counts, done if len(done) < len(packed) else None)
            if len(done) == len(self._rows):
                return result
            for place, row_logits in zip(done, result.unbind(0), strict=True):
                logits[packed[place]] = row_logits
            waiting = [number for number in waiting if number not in finished]
        return torch.stack([row for row in logits if row is not None])

    def prefill(self) -> None:
        """Bring caches to prefix + tokens ahead of need, as far as there is room; nobody's blocks are taken for it.

        Raises:
            Exception: Whatever a forward pass raises; the caches may then hold garbage.
        """
        self._pending = [
            self._missing(row) if len(row.cache.tokens) < len(row.prefix) + len(row.tokens) else []
            for row in self._rows
        ]
        waiting = [number for number, missing in enumerate(self._pending) if missing]
        while waiting:
            packed, counts, finished = self._pack(waiting)
            if not packed:
                return
            self._run(packed, counts, [])
            waiting = [number for number in waiting if number not in finished]

    def _missing(self, row: PackedRow) -> list[int]:
        """What must be computed to have the logits after prefix + tokens; at least the last token."""
        num_prefix, num_wanted = len(row.prefix), len(row.prefix) + len(row.tokens)
        if len(row.cache.tokens) >= num_wanted:  # a repeated step: its last token is written again
            self._pool.truncate(row.cache, num_wanted - 1)
        num_cached = len(row.cache.tokens)
        if num_cached < num_prefix:
            return row.prefix[num_cached:] + row.tokens
        return row.tokens[num_cached - num_prefix :]

    def _pack(self, waiting: Sequence[int]) -> tuple[list[int], list[int], set[int]]:
        """Choose rows and token counts of the next pass and take their blocks, as many as fit."""
        packed: list[int] = []
        counts: list[int] = []
        finished: set[int] = set()
        room = self._max_tokens
        for number in waiting:
            if room == 0:
                break
            cache, missing = self._rows[number].cache, self._pending[number]
            if not cache.tokens:  # here, not earlier: a sibling packed just before names blocks of this very pass
                del missing[: self._pool.match(cache, missing)]
            taken = missing[:room]
            try:
                self._pool.extend(cache, taken)
            except PoolExhaustedError:
                break
            del missing[: len(taken)]
            room -= len(taken)
            packed.append(number)
            counts.append(len(taken))
            if not missing:
                finished.add(number)
        return packed, counts, finished

    def _make_room(self, waiting: Sequence[int], victims: Sequence[SequenceCache]) -> None:
        """Take all blocks of one cache that is not needed for the first waiting row."""
        done = [row.cache for number, row in enumerate(self._rows) if number not in waiting]
        for cache in (*victims, *done):
            if cache.blocks:
                self._pool.truncate(cache, 0)
                return
        for number in reversed(waiting[1:]):
            row = self._rows[number]
            if row.cache.blocks:
                self._pool.truncate(row.cache, 0)
                self._pending[number] = row.prefix + row.tokens
                return
        first = self._rows[waiting[0]]
        raise PoolExhaustedError(
            f"a row of {len(first.prefix) + len(first.tokens)} tokens does not fit into the adapter KV budget "
            f"of {self._pool.budget.total_bytes} bytes",
            place=waiting[0],
        )
