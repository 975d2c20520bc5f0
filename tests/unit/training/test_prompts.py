import json
from pathlib import Path

import pytest

from trimtab_adapters.contract.errors import IntegrityError, InvalidRequestError
from trimtab_training.models import Vocabulary
from trimtab_training.prompts import Prompt, hold_out, is_held_out, load_split, read_prompts, save_split


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_texts_and_ids_are_read_once_each_in_order(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = write(tmp_path / "p", {"prompt": "t2", "id": 1}, "", {"prompt_token_ids": [3, 4]}, {"prompt": "t2"})
    assert read_prompts(path, vocabulary) == [Prompt("t2"), Prompt("t3 t4", (3, 4))]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", {"prompt": ""}, {"prompt": 3}, {"prompt_token_ids": []}, {"prompt_token_ids": [64]}, {"text": "t1"}],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, vocabulary: Vocabulary, line: object) -> None:
    path = write(tmp_path / "p", {"prompt": "t1"}, line)
    with pytest.raises(InvalidRequestError, match="line 2"):
        read_prompts(path, vocabulary)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_prompts(tmp_path / "none", vocabulary)
    with pytest.raises(InvalidRequestError, match="no prompts"):
        read_prompts(write(tmp_path / "p"), vocabulary)


def test_the_split_loses_nothing_and_meets_the_share_on_average() -> None:
    """Of 2000 prompts 600 are held out on average, with a standard deviation of 20.5: 500 to 700 is 4.9 of them, so
    fewer than 1 in 900,000 seeds would fail; the seed is fixed."""
    prompts = [Prompt(f"t{i}") for i in range(2000)]
    train, held_out = hold_out(prompts, 0.3, seed=4)
    assert 500 < len(held_out) < 700
    assert sorted([*train, *held_out], key=prompts.index) == prompts
    assert train == sorted(train, key=prompts.index)
    assert hold_out(prompts, 0.3, seed=4) == (train, held_out)
    assert hold_out(prompts, 0.3, seed=5)[1] != held_out
    assert hold_out(prompts, 0.0, seed=4) == (prompts, [])


def test_a_prompt_stays_on_its_side_when_others_come_and_go() -> None:
    prompts = [Prompt(f"t{i}") for i in range(200)]
    train, held_out = hold_out(prompts, 0.3, seed=4)
    more = [*(Prompt(f"new {i}") for i in range(300)), *reversed(prompts)]
    later_train, later_held_out = hold_out(more, 0.3, seed=4)
    assert set(train) <= set(later_train)
    assert set(held_out) <= set(later_held_out)
    for prompt in prompts:
        assert is_held_out(prompt.text, 0.3, seed=4) == (prompt in held_out)
    assert set(held_out) <= set(hold_out(prompts, 0.5, seed=4)[1])  # a larger share only adds


@pytest.mark.parametrize("seed", range(20))
def test_neither_side_is_empty_when_there_are_two_prompts(seed: int) -> None:
    two = [Prompt("a"), Prompt("b")]
    for share in (0.01, 0.5, 0.99):
        assert [len(side) for side in hold_out(two, share, seed=seed)] == [1, 1]
    assert [len(side) for side in hold_out(two[:1], 0.5, seed=seed)] == [1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_prompts_that_read_the_same_are_on_the_same_side(seed: int) -> None:
    same = [
        Prompt("Tell me\nmore"),
        Prompt("  tell me more "),
        Prompt("ＴＥＬＬ me more"),
        Prompt("tell  me more", (1,)),
    ]
    train, held_out = hold_out([*same, Prompt("b"), Prompt("c")], 0.5, seed=seed)
    assert set(same) <= set(train) or set(same) <= set(held_out)
    assert hold_out(same, 0.5, seed=seed) == (same, [])  # nothing is left to train on otherwise


def test_a_saved_split_reads_back(tmp_path: Path) -> None:
    split = ([Prompt("a"), Prompt("b c", (1, 2))], [Prompt("d")])
    save_split(tmp_path / "prompts.json", *split)
    assert load_split(tmp_path / "prompts.json") == split
    (tmp_path / "prompts.json").write_text("{}")
    with pytest.raises(IntegrityError):
        load_split(tmp_path / "prompts.json")
