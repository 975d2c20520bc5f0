"""The adapter LMs' KV cache: fixed-size blocks, shared between rows with the same token prefix.

A cached key or value is a pure function of (adapter version, token ids up to its position), so a full block is named by
a hash chained over them. Rows hold references to blocks; a block that nobody holds stays usable by its name until its
memory is needed (least recently used first). A row that comes back after preemption, a sibling candidate of the same
prompt and a second request with the same beginning all find their blocks by name; no case is special.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK_SIZE = 16
"""Tokens in a block. Sharing is by whole blocks, so small ones share more; gathers copy whole blocks, so large ones
copy faster. 16 is vLLM's choice too."""


class PoolExhaustedError(Exception):
    """Every block is held by a row and the budget allows no more.

    Attributes:
        place: Which of the rows of a pass does not fit, where that is known.
    """

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What decides the shape of a cached block. Versions of one architecture share a pool."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_elements(self) -> int:
        """Numbers in one block of one layer, keys and values."""
        return 2 * BLOCK_SIZE * self.num_kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_elements * self.dtype.itemsize


class KvBudget:
    """Bytes that all pools together may take."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.allocated_bytes = 0

    def affordable(self, num_bytes: int) -> int:
        """How much of a wish is left in the budget."""
        return max(0, min(num_bytes, self.total_bytes - self.allocated_bytes))


@dataclass(slots=True)
class PoolCounters:
    """What happened since the start, in tokens."""

    hit_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0


@dataclass(slots=True)
class RootCounters(PoolCounters):
    """The same of one adapter version, and how many blocks hold its keys and values now, in use or only kept."""

    num_blocks: int = 0


@dataclass(slots=True, eq=False)
class SequenceCache:
    """The blocks of one row for one adapter version.

    Attributes:
        root: Name of the empty prefix: the adapter version.
        tokens: Token ids whose keys and values are in the blocks, in order.
        blocks: Block numbers; the last may be partly filled.
        names: Hash of each full block.
    """

    root: bytes
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)


def block_name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: a hash over its parent's name and its own token ids."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class KvPool:
    """Blocks of one geometry. Grows within the budget by doubling, so memory is taken only when it is used.

    Block 0 is never handed out: padded entries of block tables point to it.

    Attributes:
        layers: For each layer `[num_blocks, elements of a block]`, keys and values together. How a block is laid out
            inside is known to the attention kernel alone.
    """

    def __init__(self, geometry: KvGeometry, budget: KvBudget, device: torch.device, *, min_blocks: int = 64) -> None:
        self.geometry = geometry
        self.budget = budget
        self.device = device
        self.counters = PoolCounters()
        self.by_root: dict[bytes, RootCounters] = {}
        self.layers: list[Tensor] = []
        self.num_blocks = 0
        self._references: list[int] = []
        self._names: list[bytes | None] = []
        self._roots: list[bytes] = []
        self._by_name: dict[bytes, int] = {}
        self._free: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._grow(min_blocks)
        if self.num_blocks < 2:
            budget.allocated_bytes -= self.num_blocks * geometry.block_bytes
            raise PoolExhaustedError(
                f"the adapter KV budget of {budget.total_bytes} bytes has no room for a block of {geometry.block_bytes}"
            )

    @property
    def num_used(self) -> int:
        """Blocks held by rows."""
        return self.num_blocks - 1 - len(self._free) - len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks held by nobody but still usable by name."""
        return len(self._idle)

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest single row that this pool could ever hold."""
        more = self.budget.affordable(self.budget.total_bytes) // self.geometry.block_bytes
        return (self.num_blocks - 1 + more) * BLOCK_SIZE

    def of_root(self, root: bytes) -> RootCounters:
        """Counters of one adapter version."""
        counters = self.by_root.get(root)
        if counters is None:
            counters = self.by_root[root] = RootCounters()
        return counters

    def forget(self, root: bytes) -> None:
        """Give back all blocks that are kept for a version that nobody uses any more, and its counters."""
        for block in [block for block in self._idle if self._roots[block] == root]:
            del self._idle[block]
            self._unname(block)
            self._set_free(block)
        counters = self.by_root.get(root)
        if counters is not None and counters.num_blocks == 0:
            del self.by_root[root]

    def match(self, sequence: SequenceCache, token_ids: Sequence[int]) -> int:
        """Point an empty sequence at the longest run of cached blocks that its tokens name.

        At least one token is left over, because its logits must be computed. Returns the number of tokens found.
        """
        assert not sequence.blocks, "only an empty sequence is matched"
        parent = sequence.root
        for start in range(0, (len(token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
            ids = token_ids[start : start + BLOCK_SIZE]
            name = block_name(parent, ids)
            block = self._by_name.get(name)
            if block is None:
                break
            self._hold(block)
            sequence.blocks.append(block)
            sequence.names.append(name)
            sequence.tokens.extend(ids)
            parent = name
        self.counters.hit_tokens += len(sequence.tokens)
        self.of_root(sequence.root).hit_tokens += len(sequence.tokens)
        return len(sequence.tokens)

    def extend(self, sequence: SequenceCache, token_ids: Sequence[int]) -> None:
        """Take the blocks for more tokens and name those that become full. Their content must be written before read.

        Raises:
            PoolExhaustedError: Nothing was changed.
        """
        num_blocks = -(-(len(sequence.tokens) + len(token_ids)) // BLOCK_SIZE)
        taken: list[int] = []
        try:
            for _ in range(num_blocks - len(sequence.blocks)):
                taken.append(self._take(sequence.root))
        except Exception:  # also when memory ran out while the pool grew
            for block in taken:
                self._release(block)
            raise
        sequence.blocks.extend(taken)
        sequence.tokens.extend(token_ids)
        self.counters.computed_tokens += len(token_ids)
        self.of_root(sequence.root).computed_tokens += len(token_ids)
        while (len(sequence.names) + 1) * BLOCK_SIZE <= len(sequence.tokens):
            start = len(sequence.names) * BLOCK_SIZE
            parent = sequence.names[-1] if sequence.names else sequence.root
            name = block_name(parent, sequence.tokens[start : start + BLOCK_SIZE])
            block = sequence.blocks[len(sequence.names)]
            sequence.names.append(name)
            if name not in self._by_name:
                self._by_name[name] = block
                self._names[block] = name

    def truncate(self, sequence: SequenceCache, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` tokens, rounded down to whole blocks."""
        num_blocks = num_tokens // BLOCK_SIZE
        num_lost = len(sequence.tokens) - num_blocks * BLOCK_SIZE
        self.counters.recomputed_tokens += num_lost
        self.of_root(sequence.root).recomputed_tokens += num_lost
        for block in sequence.blocks[num_blocks:]:
            self._release(block)
        del sequence.blocks[num_blocks:], sequence.names[num_blocks:], sequence.tokens[num_blocks * BLOCK_SIZE :]

    def release(self, sequence: SequenceCache) -> None:
        """Let all blocks of a row go; named ones stay usable until their memory is needed."""
        for block in reversed(sequence.blocks):  # so that the end of a prefix is evicted before its beginning
            self._release(block)
        sequence.blocks.clear()
        sequence.names.clear()
        sequence.tokens.clear()

    def discard(self, sequence: SequenceCache) -> None:
        """Let a row go whose blocks may hold garbage, because a forward pass failed: nobody may find them by name."""
        own = [block for block in sequence.blocks if self._references[block] == 1]
        for block in own:
            self._unname(block)
        for layer in self.layers:  # a NaN would poison whoever gets the block next: 0 times NaN is NaN
            layer[own] = 0.0
        self.release(sequence)

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            if self._names[block] is None:
                self._set_free(block)
            else:
                self._idle[block] = None

    def _set_free(self, block: int) -> None:
        self.by_root[self._roots[block]].num_blocks -= 1
        self._free.append(block)

    def _take(self, root: bytes) -> int:
        if not self._free and not self._grow(self.num_blocks):
            if not self._idle:
                raise PoolExhaustedError(f"all {self.num_blocks - 1} blocks of the adapter KV cache are in use")
            oldest, _ = self._idle.popitem(last=False)
            self._unname(oldest)
            self._set_free(oldest)
        block = self._free.pop()
        self._references[block] = 1
        self._roots[block] = root
        self.of_root(root).num_blocks += 1
        return block

    def _unname(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            del self._by_name[name]
            self._names[block] = None

    def _grow(self, num_more: int) -> bool:
        block_bytes = self.geometry.block_bytes
        num_more = self.budget.affordable(num_more * block_bytes) // block_bytes
        if num_more <= 0:
            return False
        shape = (self.num_blocks + num_more, self.geometry.block_elements)
        # Zeros, because kernels multiply what lies behind a row's end by 0, and 0 times NaN is NaN. All layers or none:
        # memory may run out at any of them.
        grown = [
            torch.zeros(shape, dtype=self.geometry.dtype, device=self.device) for _ in range(self.geometry.num_layers)
        ]
        for new, old in zip(grown, self.layers, strict=bool(self.layers)):
            new[: self.num_blocks] = old
        self.layers[:] = grown
        first = max(self.num_blocks, 1)
        self.num_blocks += num_more
        self._references.extend([0] * num_more)
        self._names.extend([None] * num_more)
        self._roots.extend([b""] * num_more)
        self._free.extend(range(self.num_blocks - 1, first - 1, -1))
        self.budget.allocated_bytes += num_more * block_bytes
        return True
