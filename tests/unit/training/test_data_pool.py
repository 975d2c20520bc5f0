import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_training.data_pool import DataPool, PoolItem, quantile_bins

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -3.0, 1e9]) | st.floats(-5, 5), max_size=60)


def items(rewards: list[float]) -> list[PoolItem]:
    return [PoolItem((1, 2), (index + 1,), reward) for index, reward in enumerate(rewards)]


def test_bins_are_equal_and_the_remainder_is_worst() -> None:
    # 7 items, 3 bins of 2; best first: 9 8 | 7 6 | 5 4 and the remainder 3
    bins = quantile_bins(np.array([3.0, 9.0, 5.0, 7.0, 4.0, 8.0, 6.0]), 3)
    assert bins.tolist() == [2, 0, 2, 1, 2, 0, 1]


def test_ties_at_an_edge_are_split_in_the_order_of_arrival() -> None:
    assert quantile_bins(np.zeros(5), 2).tolist() == [0, 0, 1, 1, 1]


def test_fewer_items_than_bins_are_all_worst() -> None:
    assert quantile_bins(np.array([2.0, 1.0]), 5).tolist() == [4, 4]


@given(rewards=REWARDS, num_bins=st.integers(1, 7))
def test_bins_are_equal_and_ordered_by_reward(rewards: list[float], num_bins: int) -> None:
    bins = quantile_bins(np.array(rewards, dtype=np.float64), num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    assert counts[:-1].tolist() == [len(rewards) // num_bins] * (num_bins - 1)
    for better in range(num_bins):
        for worse in range(better + 1, num_bins):
            in_better = [r for r, b in zip(rewards, bins, strict=True) if b == better]
            in_worse = [r for r, b in zip(rewards, bins, strict=True) if b == worse]
            assert not in_better or not in_worse or min(in_better) >= max(in_worse)


@given(first=REWARDS, second=REWARDS, num_bins=st.integers(1, 7))
def test_growing_in_two_parts_gives_the_bins_of_the_whole(
    first: list[float], second: list[float], num_bins: int
) -> None:
    pool = DataPool(num_bins, seed=0)
    pool.add(items(first))
    pool.add(items(second))
    assert pool.bins.tolist() == quantile_bins(np.array(first + second, dtype=np.float64), num_bins).tolist()
    assert len(pool) == len(first) + len(second)


@given(size=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 5))
def test_each_pass_draws_every_item_once(size: int, batch_size: int, seed: int) -> None:
    pool = DataPool(3, seed=seed)
    pool.add(items([float(i) for i in range(size)]))
    drawn: list[int] = []
    while len(drawn) < 2 * size:
        batch = pool.draw(batch_size)
        assert len(batch) == batch_size
        drawn.extend(row.item.output_token_ids[0] for row in batch)
    assert sorted(drawn[:size]) == sorted(drawn[size : 2 * size]) == list(range(1, size + 1))


def test_a_drawn_row_carries_its_items_bin() -> None:
    pool = DataPool(2, seed=0)
    pool.add(items([0.0, 1.0, 2.0, 3.0]))
    drawn = {row.item.output_token_ids: row.bin for row in pool.draw(4)}
    assert drawn == {(1,): 1, (2,): 1, (3,): 0, (4,): 0}


@given(size=st.integers(1, 30), num_draws=st.integers(0, 9))
def test_a_restored_pool_draws_on_as_if_nothing_had_happened(size: int, num_draws: int) -> None:
    pool = DataPool(3, seed=1)
    pool.add([PoolItem(tuple(range(1, 2 + i % 3)), tuple(range(1, 2 + i % 5)), float(i % 4)) for i in range(size)])
    for _ in range(num_draws):
        pool.draw(4)
    copy = DataPool.restore(3, pool.arrays(), json.loads(json.dumps(pool.rng_state())))
    assert copy.items == pool.items
    assert copy.bins.tolist() == pool.bins.tolist()
    for _ in range(2 * size):
        assert copy.draw(3) == pool.draw(3)


@pytest.mark.parametrize("item", [PoolItem((), (1,), 0.0), PoolItem((1,), (), 0.0), PoolItem((1,), (1,), float("nan"))])
def test_an_unusable_item_is_refused_and_nothing_is_added(item: PoolItem) -> None:
    pool = DataPool(2, seed=0)
    with pytest.raises(ValueError, match="pool item"):
        pool.add([PoolItem((1,), (1,), 0.0), item])
    assert len(pool) == 0


def test_an_empty_pool_cannot_be_drawn_from() -> None:
    with pytest.raises(ValueError, match="empty"):
        DataPool(2, seed=0).draw(1)
