import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from trimtab_adapters.kv_pool import BLOCK_SIZE, KvBudget, KvGeometry, KvPool, PoolExhaustedError, SequenceCache

GEOMETRY = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)
CPU = torch.device("cpu")


def pool_of(num_blocks: int, *, min_blocks: int | None = None) -> KvPool:
    """A pool with room for `num_blocks` blocks beside the padding block."""
    budget = KvBudget((num_blocks + 1) * GEOMETRY.block_bytes)
    return KvPool(GEOMETRY, budget, CPU, min_blocks=min_blocks or num_blocks + 1)


def test_a_block_takes_the_bytes_that_the_budget_counts() -> None:
    pool = pool_of(3)
    real = sum(t.numel() * t.element_size() for t in pool.layers)
    assert real == 4 * GEOMETRY.block_bytes == pool.budget.allocated_bytes


def test_a_sibling_shares_whole_blocks_and_computes_at_least_one_token() -> None:
    pool, tokens = pool_of(8), list(range(2 * BLOCK_SIZE))
    first, second = SequenceCache(root=b"v"), SequenceCache(root=b"v")
    assert pool.match(first, tokens) == 0
    pool.extend(first, tokens)
    assert pool.match(second, tokens) == BLOCK_SIZE  # the second block's last token must be computed anew
    assert second.blocks == first.blocks[:1]
    assert pool.match(SequenceCache(root=b"v"), [*tokens, 7]) == 2 * BLOCK_SIZE


def test_another_version_or_another_beginning_shares_nothing() -> None:
    pool, tokens = pool_of(8), list(range(2 * BLOCK_SIZE))
    pool.extend(SequenceCache(root=b"v"), tokens)
    assert pool.match(SequenceCache(root=b"w"), tokens) == 0
    assert pool.match(SequenceCache(root=b"v"), [99, *tokens[1:]]) == 0


def test_released_blocks_are_found_again_until_their_memory_is_needed() -> None:
    pool, tokens = pool_of(2), list(range(2 * BLOCK_SIZE))
    sequence = SequenceCache(root=b"v")
    pool.extend(sequence, tokens)
    pool.release(sequence)
    assert (pool.num_used, pool.num_cached) == (0, 2)
    assert pool.match(sequence, [*tokens, 1]) == 2 * BLOCK_SIZE
    pool.release(sequence)
    other = SequenceCache(root=b"w")
    pool.extend(other, [1])  # evicts the end of the old prefix first, so its beginning is still of use
    assert pool.match(sequence, [*tokens, 1]) == BLOCK_SIZE


def test_an_exhausted_pool_changes_nothing() -> None:
    pool = pool_of(2)
    sequence, greedy = SequenceCache(root=b"v"), SequenceCache(root=b"w")
    pool.extend(sequence, [1])
    with pytest.raises(PoolExhaustedError):
        pool.extend(greedy, list(range(2 * BLOCK_SIZE)))
    assert greedy.blocks == []
    assert pool.num_used == 1
    pool.extend(greedy, [1])


def test_the_pool_grows_within_its_budget_and_keeps_its_content() -> None:
    pool = pool_of(7, min_blocks=2)
    assert pool.num_blocks == 2
    sequence = SequenceCache(root=b"v")
    pool.extend(sequence, [1])
    pool.layers[0][sequence.blocks[0]] = 5.0
    pool.extend(sequence, list(range(6 * BLOCK_SIZE)))
    assert pool.num_blocks == 8
    assert bool((pool.layers[0][sequence.blocks[0]] == 5.0).all())
    assert pool.budget.allocated_bytes == pool.budget.total_bytes


def test_a_budget_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(PoolExhaustedError, match="no room"):
        KvPool(GEOMETRY, KvBudget(GEOMETRY.block_bytes), CPU)


def test_discarded_blocks_are_found_by_nobody() -> None:
    pool, tokens = pool_of(4), list(range(BLOCK_SIZE))
    sequence = SequenceCache(root=b"v")
    pool.extend(sequence, tokens)
    pool.discard(sequence)
    assert pool.match(SequenceCache(root=b"v"), [*tokens, 1]) == 0
    assert pool.num_used == 0


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(0, 80))
def test_truncating_keeps_a_prefix_of_whole_blocks(tokens: list[int], keep: int) -> None:
    pool, sequence = pool_of(8), SequenceCache(root=b"v")
    pool.extend(sequence, tokens)
    keep = min(keep, len(tokens))
    pool.truncate(sequence, keep)
    assert sequence.tokens == tokens[: keep // BLOCK_SIZE * BLOCK_SIZE]
    assert len(sequence.blocks) == len(sequence.names) == keep // BLOCK_SIZE


class PoolMachine(RuleBasedStateMachine):
    """Whatever rows do, blocks are neither lost nor handed out twice, and a name always means the same tokens."""

    rows: "Bundle[SequenceCache]" = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(12, min_blocks=3)
        self.alive: list[SequenceCache] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(target=rows, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=50))
    def start(self, tokens: list[int]) -> SequenceCache:
        row = SequenceCache(root=b"v")
        found = self.pool.match(row, tokens)
        for position in range(found // BLOCK_SIZE):
            end = (position + 1) * BLOCK_SIZE
            assert self.content[row.blocks[position]] == tuple(tokens[:end]), "a shared block holds other tokens"
        self.alive.append(row)
        self.grow(row, tokens[found:])
        return row

    @rule(row=rows, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def grow(self, row: SequenceCache, tokens: list[int]) -> None:
        if row not in self.alive:
            return
        try:
            self.pool.extend(row, tokens)
        except PoolExhaustedError:
            return
        for position in range(len(row.tokens) // BLOCK_SIZE):
            end = (position + 1) * BLOCK_SIZE
            self.content[row.blocks[position]] = tuple(row.tokens[:end])

    @rule(row=consumes(rows), failed=st.booleans())
    def end(self, row: SequenceCache, failed: bool) -> None:
        (self.pool.discard if failed else self.pool.release)(row)
        self.alive = [other for other in self.alive if other is not row]

    @invariant()
    def every_block_is_somewhere_once(self) -> None:
        held = {block for row in self.alive for block in row.blocks}
        assert 0 not in held
        assert len(held) == self.pool.num_used
        assert self.pool.num_used + self.pool.num_cached + len(self.pool._free) == self.pool.num_blocks - 1


TestPoolMachine = PoolMachine.TestCase
