"""What the tasks are made of: parts without common prompts, numbers about texts, classifiers, the cache."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.classifiers import Labelled, LogOdds, TreeModel, View, WordModel, output_of, quality, rows_of
from tasks.keywords import Product, broken_up
from tasks.language_models import cached
from tasks.plan import TASKS, plan_for
from tasks.rows import part_of
from tasks.task import LongEnough
from tasks.text_numbers import Familiarity, longest_common_run, shape, share_of_runs, support
from trimtab_adapters.contract.rewards import RewardInput


def of(*outputs: str) -> list[RewardInput]:
    return [RewardInput("", output) for output in outputs]


class Lengths:
    """A score that is easily foretold."""

    version = "1"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [float(len(item.output)) for item in inputs]


def test_a_prompt_is_always_in_the_same_part_and_parts_have_their_shares() -> None:
    parts = [part_of(f"prompt {i}") for i in range(5000)]
    assert parts == [part_of(f"prompt {i}") for i in range(5000)]
    shares = {part: parts.count(part) / 5000 for part in ("training", "judge", "held_out")}
    # Standard errors 0.007 and 0.006: beyond 0.035 with odds under 1e-6, and the hash never changes.
    assert shares == pytest.approx({"training": 0.4, "judge": 0.4, "held_out": 0.2}, abs=0.035)


def test_the_shape_of_a_text_counts_words_repetitions_and_function_words() -> None:
    # the, dog, dog, barks: 3 of 4 differ, one function word, one immediate repetition.
    assert shape("The dog dog barks.") == [4.0, 0.75, 0.25, 0.25]
    assert shape("") == [0.0, 0.0, 0.0, 0.0]


def test_support_is_what_a_reply_has_from_its_source() -> None:
    source, reply = "Crayola makes chalk and crayons in Easton", "crayola makes crayons and blue chalk"
    # Content words: crayola makes crayons blue chalk, of which blue is new. Pairs of the reply: crayola-makes (known),
    # makes-crayons, crayons-and, and-blue, blue-chalk: 1 of 5. No triple of 4. Longest run: 2 of 6 words.
    assert support(source, reply) == pytest.approx([4 / 5, 1 / 5, 0.0, 2 / 6, 1.0])
    assert support(source, "") == [0.0, 0.0, 0.0, 0.0, 0.0]


def test_the_longest_run_may_lie_anywhere() -> None:
    assert longest_common_run(["a", "b", "c", "d"], ["x", "b", "c", "d", "y"]) == 3
    assert longest_common_run(["a"], []) == 0
    assert share_of_runs(["a"], ["a"], 2) == 0.0


def test_familiar_order_is_told_from_the_same_words_in_another_order() -> None:
    usual = Familiarity(["the dog runs", "the cat sleeps"])
    # < the, the dog, dog runs, runs > are all known; reversed, only none of the 4 pairs is, and both words always are.
    assert usual.numbers("the dog runs") == [1.0, 1.0, 0.0]
    assert usual.numbers("runs dog the") == [0.0, 0.0, 1.0]
    # < zebra, zebra > are unknown because a word is: that is not odd order.
    assert usual.numbers("zebra") == [0.0, 0.0, 0.0]


def test_what_is_too_short_gets_the_lowest_score() -> None:
    scores = LongEnough(Lengths(), 3)
    assert scores.score(of("a b c", "a b", "")) == [5.0, 0.0, 0.0]
    assert LongEnough(Lengths(), 3, 0.5).score(of("a b c", "a b")) == [5.0, 0.5]
    versions = {LongEnough(Lengths(), *settings).version for settings in ((3,), (4,), (3, 0.5))}
    assert len(versions) == 3


def test_log_odds_keep_what_is_nearly_impossible_apart() -> None:
    class Probabilities:
        version = "1"

        def score(self, inputs: Sequence[RewardInput]) -> list[float]:
            return [float(item.output) for item in inputs]

    scores = LogOdds(Probabilities()).score(of("0.5", "0.001", "0.01", "0", "1"))
    assert scores[:3] == pytest.approx([0.0, -6.9068, -4.5951], abs=1e-4)
    assert -14 < scores[3] < -13
    assert 13 < scores[4] < 14


def test_a_product_multiplies_scores() -> None:
    assert Product((Lengths(), Lengths())).score(of("abc", "")) == [9.0, 0.0]


@pytest.mark.parametrize("seed", range(20))
def test_a_broken_sentence_is_another_one_of_the_same_words(seed: int) -> None:
    sentence = "a man rides his brown horse along the wide beach"
    broken = broken_up(f" {sentence}", random.Random(seed))
    assert broken.startswith(" ")
    assert broken.strip() != sentence
    assert set(broken.split()) <= set(sentence.split())


def examples(num: int, seed: int) -> list[Labelled]:
    """Texts that are good when they say `kind`, and bad when they say `cruel`."""
    rng = random.Random(seed)
    filler = [f"word{i}" for i in range(30)]
    rows = []
    for index in range(num):
        is_good = index % 2 == 0
        text = [*rng.choices(filler, k=6), "kind" if is_good else "cruel"]
        rng.shuffle(text)
        rows.append(Labelled(RewardInput("", " ".join(text)), float(is_good)))
    return rows


@pytest.mark.parametrize("family", [WordModel, TreeModel])
def test_both_families_learn_a_word_that_decides(family: type[WordModel] | type[TreeModel]) -> None:
    model = family(examples(200, 0), View((output_of,), lambda item: shape(item.output)))
    fresh = examples(100, 1)
    assert quality(model.score(rows_of(fresh)), fresh) == {
        "accuracy": 1.0,
        "auc": 1.0,
        "share_good": 0.5,
        "rows": 100.0,
    }
    assert model.score([]) == []


@pytest.mark.parametrize("family", [WordModel, TreeModel])
def test_uncertain_labels_give_uncertain_probabilities(family: type[WordModel] | type[TreeModel]) -> None:
    rows = [Labelled(row.item, 0.7) for row in examples(200, 0)]
    # Every row says 0.7, so nothing but the mean can be learned; regularisation leaves a little play.
    assert family(rows, View((output_of,))).score(of("word1 kind", "other")) == pytest.approx([0.7, 0.7], abs=0.05)


def test_classifiers_of_other_rows_have_another_version() -> None:
    view = View((output_of,))
    versions = {WordModel(examples(num, 0), view).version for num in (50, 50, 60)}
    assert len(versions) == 2


def test_what_is_cached_is_made_once_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def make(directory: Path) -> None:
        made.append(1)
        (directory / "weights").write_text("w")

    def fail(directory: Path) -> None:
        (directory / "weights").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        cached("x", {"a": 1}, fail)
    first = cached("x", {"a": 1}, make)
    assert cached("x", {"a": 1}, make) == first
    assert (first / "weights").read_text() == "w"
    assert cached("x", {"a": 2}, make) != first
    assert len(made) == 2
    assert len(list(first.parent.iterdir())) == 2


def test_every_task_has_a_plan_and_an_unknown_setting_is_an_error() -> None:
    for task in TASKS:
        quick, full = (plan_for(task, quick=quick, overrides={}) for quick in (True, False))
        assert quick.steps < full.steps
        json.dumps(quick.described())
    assert plan_for("toxicity", quick=True, overrides={"steps": 3, "expert": {"epochs": 1}}).expert.epochs == 1
    with pytest.raises(TypeError):
        plan_for("toxicity", quick=True, overrides={"stepps": 3})
