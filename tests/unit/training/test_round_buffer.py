import numpy as np
import pytest

from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.objectives.round_buffer import RoundBuffer


def rollout(output: tuple[int, ...]) -> ScoredRollout:
    known = tuple(-1.0 for _ in output)
    return ScoredRollout((1, 2), output, 0.5, 0, behaviour_logprobs=known, base_logprobs=known)


def buffer() -> RoundBuffer:
    return RoundBuffer(2, columns=("a",), token_columns=("b",), seed=0)


def test_numbers_belong_to_rows_and_to_their_tokens() -> None:
    rows = buffer()
    rows.replace(
        [rollout((3, 4)), rollout((5,))], {"a": np.array([1.0, 2.0])}, {"b": [np.array([1.0, 2.0]), np.ones(1)]}
    )
    assert rows.column("a").tolist() == [1.0, 2.0]
    assert [row.tolist() for row in rows.token_column("b", [1, 0])] == [[1.0], [1.0, 2.0]]
    assert not rows.is_used_up


@pytest.mark.parametrize(
    ("columns", "token_columns"),
    [
        ({}, {"b": [np.ones(2), np.ones(1)]}),
        ({"a": np.ones(1)}, {"b": [np.ones(2), np.ones(1)]}),
        ({"a": np.ones(2)}, {}),
        ({"a": np.ones(2)}, {"b": [np.ones(2)]}),
        ({"a": np.ones(2)}, {"b": [np.ones(2), np.ones(2)]}),
    ],
)
def test_a_round_without_a_number_for_each_row_and_token_is_refused(
    columns: dict[str, np.ndarray], token_columns: dict[str, list[np.ndarray]]
) -> None:
    rows = buffer()
    with pytest.raises(ValueError, match="a round needs one number per"):
        rows.replace([rollout((3, 4)), rollout((5,))], columns, token_columns)
    assert len(rows) == 0


@pytest.mark.parametrize("outputs", [[], [(3,)], [(3, 4), (5,), (6, 7, 8)]])
def test_a_restored_round_is_the_same(outputs: list[tuple[int, ...]]) -> None:
    first, second = buffer(), buffer()
    numbers = np.random.default_rng(1)
    first.replace(
        [rollout(output) for output in outputs],
        {"a": numbers.normal(size=len(outputs))},
        {"b": [numbers.normal(size=len(output)) for output in outputs]},
    )
    first.draw(2)
    second.load_state(first.state())
    assert second.rollouts == first.rollouts
    assert second.column("a").tolist() == first.column("a").tolist()
    every = range(len(outputs))
    assert [r.tolist() for r in second.token_column("b", every)] == [r.tolist() for r in first.token_column("b", every)]
    assert [second.draw(2) for _ in range(4)] == [first.draw(2) for _ in range(4)]
    assert second.is_used_up
    first.replace([rollout((9,))] * 5, {"a": np.ones(5)}, {"b": [np.ones(1)] * 5})
    second.replace([rollout((9,))] * 5, {"a": np.ones(5)}, {"b": [np.ones(1)] * 5})
    assert first.draw(5) == second.draw(5)
