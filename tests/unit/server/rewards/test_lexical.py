"""Rewards from keywords, a sentiment lexicon and regular expressions."""

import time
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardModel, RewardSpec
from trimtab_server.rewards.coverage import binary_coverage, coverage, first_appearances, ordered_coverage
from trimtab_server.rewards.keywords import KeywordReward
from trimtab_server.rewards.regex_match import RegexReward
from trimtab_server.rewards.sentiment import SentimentReward


def keywords(*outputs: str, prompt: str = "", **options: Any) -> list[float]:
    reward = KeywordReward.load(RewardSpec(name="words", kind="keywords", options=options))
    assert isinstance(reward, RewardModel)
    return reward.score([RewardInput(prompt, output) for output in outputs])


def matches(pattern: str, *outputs: str, **options: Any) -> list[float]:
    reward = RegexReward.load(RewardSpec(name="pattern", kind="regex", target=pattern, options=options))
    return reward.score([RewardInput("", output) for output in outputs])


def sentiment(*outputs: str, **options: Any) -> list[float]:
    reward = SentimentReward.load(RewardSpec(name="mood", kind="sentiment", options=options))
    return reward.score([RewardInput("", output) for output in outputs])


def words(text: str) -> list[frozenset[str]]:
    return [frozenset((word,)) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "covered", "ordered", "binary"),
    [
        ("a b c d", 1.0, 1.0, 1.0),
        ("x a x b a c d", 1.0, 1.0, 1.0),  # only first appearances count
        ("a b", 0.5, 0.5, 0.0),
        ("a c d", 0.75, 0.25, 0.0),  # a, c, d against a, b, c, d: they agree at the first place only
        ("b a c d", 1.0, 0.0, 0.0),  # b, a against a, b: not at the first place
        ("a b d c", 1.0, 0.5, 0.0),
        ("b c d", 0.75, 0.0, 0.0),
        ("x", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_the_measures_of_coverage(text: str, covered: float, ordered: float, binary: float) -> None:
    places = first_appearances([words(keyword) for keyword in "abcd"], words(text))
    assert (coverage(places), ordered_coverage(places), binary_coverage(places)) == (covered, ordered, binary)


def test_a_keyword_of_several_words_stands_in_a_row() -> None:
    assert first_appearances([words("b c"), words("c")], words("c x b b c")) == [3, 0]
    assert first_appearances([words("a b")], words("a")) == [None]


def test_words_are_compared_by_their_lemmas() -> None:
    found = keywords(
        "Mice ran.",
        "The mouse runs!",
        "“Running” (mouse)",
        "MICE RUN",
        "a mousetrap, a runner",
        keywords=["mouse", "run"],
    )
    assert found == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_the_case_of_a_lemma_does_not_matter() -> None:
    assert keywords("Germans came", "german beer", keywords=["german"]) == [1.0, 1.0]


def test_the_language_decides_on_lemmas() -> None:
    assert keywords("Die Häuser stehen leer", keywords=["Haus"], language="de") == [1.0]
    assert keywords("Die Häuser stehen leer", keywords=["Haus"], language="en") == [0.0]


def test_keywords_can_stand_in_the_prompt() -> None:
    options: dict[str, Any] = {"prompt_pattern": r"Keywords: (.+)", "measure": "ordered"}
    prompt = "Write a sentence.\nKeywords: dog, ball ,  park\nAnswer:"
    assert keywords("Dogs chase balls in a park", "The park has a dog", prompt=prompt, **options) == [1.0, 0.0]
    prompt = "Keywords: dog;ball"
    assert keywords("a dog", prompt=prompt, **options, separator=";") == [0.5]
    # A repetition is no further keyword.
    assert keywords("a dog", prompt="Keywords: dog, dogs, Dog, ball", **options) == [0.5]


@pytest.mark.parametrize("prompt", ["", "Write.", "Keywords: ,", "Keywords: " + ", ".join(f"w{i}" for i in range(300))])
def test_a_prompt_that_names_no_keywords_is_an_error_and_not_zero(prompt: str) -> None:
    with pytest.raises(RewardError, match="the prompt of output 1 of 1 does not name them"):
        keywords("a dog", prompt=prompt, prompt_pattern=r"Keywords: (.+)")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({}, "options"),
        ({"keywords": ["a"], "prompt_pattern": "(a)"}, "options"),
        ({"keywords": []}, "options.keywords"),
        ({"keywords": [1]}, "options.keywords"),
        ({"keywords": "dog"}, "options.keywords"),
        ({"keywords": ["dog", "..."]}, "options.keywords"),
        ({"keywords": ["dog", "dogs"]}, "options.keywords"),
        ({"prompt_pattern": "("}, "options.prompt_pattern"),
        ({"prompt_pattern": "a"}, "options.prompt_pattern"),
        ({"prompt_pattern": "(a)(b)"}, "options.prompt_pattern"),
        ({"keywords": ["a"], "language": "xx"}, "options.language"),
        ({"keywords": ["a"], "measure": "most"}, "options.measure"),
    ],
)
def test_bad_options_for_keywords_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        keywords("x", **options)
    assert caught.value.param == param


def test_a_kind_without_a_target_has_none() -> None:
    with pytest.raises(InvalidRequestError, match="has no target") as caught:
        KeywordReward.load(RewardSpec(name="w", kind="keywords", target="dog", options={"keywords": ["a"]}))
    assert caught.value.param == "target"
    with pytest.raises(InvalidRequestError, match="needs a target"):
        RegexReward.load(RewardSpec(name="w", kind="regex"))


def test_sentiment_is_that_of_the_lexicon() -> None:
    text = "VADER is smart, handsome, and funny."
    assert sentiment(text) == [0.8316]  # The example of VADER's own documentation.
    assert sentiment(text, value="pos") == [0.746]
    assert sentiment(text, value="neg") == [0.0]
    assert sentiment(text, label="negative") == [-0.8316]
    good, bad = sentiment("I love it", "I hate it")
    assert bad < 0 < good
    assert sentiment("", "the table") == [0.0, 0.0]


def test_bad_options_for_sentiment_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sentiment("x", value="mood")
    assert caught.value.param == "options.value"


def test_a_pattern_is_found_counted_or_matched_in_full() -> None:
    outputs = ("please, please", "no", "please")
    assert matches("please", *outputs) == [1.0, 0.0, 1.0]
    assert matches("please", *outputs, value="count") == [2.0, 0.0, 1.0]
    assert matches("please", *outputs, match="full") == [0.0, 0.0, 1.0]
    assert matches("please", *outputs, value="count", sign="penalty") == [-2.0, 0.0, -1.0]
    assert matches("^PLEASE$", "x\nplease", flags=["ignore_case", "multi_line"]) == [1.0]
    assert matches("a.b", "a\nb") == [0.0]
    assert matches("a.b", "a\nb", flags=["dot_all"]) == [1.0]
    assert matches("(x)|y", "y") == [1.0]  # a group that takes no part in the match


@pytest.mark.parametrize("options", [{}, {"match": "full"}, {"value": "count"}])
def test_a_pattern_that_takes_exponential_time_is_an_error_in_time(options: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'pattern' took longer than 0.1 s on one text"):
        matches(r"(?:(?:a|aa)+)+$", "a" * 60 + "b", match_timeout_s=0.1, **options)
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("pattern", ["(", "*", "[", "(?P<a>x)(?P<a", "a" * 5000])
def test_a_pattern_that_does_not_compile_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        matches(pattern, "x")
    assert caught.value.param == "target"


def test_versions_follow_what_is_scored_with() -> None:
    def version(kind: Any, target: str = "", **options: Any) -> str:
        builders: dict[str, Any] = {"regex": RegexReward, "keywords": KeywordReward, "sentiment": SentimentReward}
        return str(builders[kind].load(RewardSpec(name="r", kind=kind, target=target, options=options)).version)

    assert version("regex", "a") == version("regex", "a", timeout_s=1.0, cache_size=0)
    assert len({version("regex", "a"), version("regex", "b"), version("regex", "a", value="count")}) == 3
    assert version("keywords", keywords=["a"]) != version("keywords", keywords=["b"])
    assert version("sentiment") != version("sentiment", label="negative")
