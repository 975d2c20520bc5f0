import json
from pathlib import Path

import pytest

from trimtab_adapters.contract.errors import IntegrityError, InvalidRequestError
from trimtab_training.models import Vocabulary
from trimtab_training.prompts import Prompt, hold_out, load_split, read_prompts, save_split


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


def test_the_split_is_by_share_and_seed_and_loses_nothing() -> None:
    prompts = [Prompt(f"t{i}") for i in range(10)]
    train, held_out = hold_out(prompts, 0.3, seed=4)
    assert len(held_out) == 3
    assert sorted([*train, *held_out], key=prompts.index) == prompts
    assert hold_out(prompts, 0.3, seed=4) == (train, held_out)
    assert any(hold_out(prompts, 0.3, seed=seed) != (train, held_out) for seed in range(5))
    assert hold_out(prompts, 0.0, seed=4) == (prompts, [])
    assert [len(part) for part in hold_out(prompts[:2], 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in hold_out(prompts[:1], 0.5, seed=0)] == [1, 0]


def test_a_saved_split_reads_back(tmp_path: Path) -> None:
    split = ([Prompt("a"), Prompt("b c", (1, 2))], [Prompt("d")])
    save_split(tmp_path / "prompts.json", *split)
    assert load_split(tmp_path / "prompts.json") == split
    (tmp_path / "prompts.json").write_text("{}")
    with pytest.raises(IntegrityError):
        load_split(tmp_path / "prompts.json")
