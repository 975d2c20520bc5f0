"""Rewards that are Python code."""

import asyncio
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import RewardInput, RewardModel
from trimtab_server.rewards.attempts import is_async
from trimtab_server.rewards.callable import ENTRY_POINT_GROUP, AsyncCallableReward, load_callable, wrap_callable

SECRET = "my password is hunter2"


def length(prompt: str, output: str) -> float:
    return float(len(output))


def keyword_share(prompt: str, output: str, *, keyword: str = "a") -> float:
    return output.count(keyword) / max(1, len(output))


def batch_lengths(inputs: Sequence[RewardInput]) -> list[int]:
    return [len(item.output) for item in inputs]


class Scaled:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [self.factor * len(item.output) for item in inputs]


def inputs(*outputs: str) -> list[RewardInput]:
    return [RewardInput(prompt="p", output=output) for output in outputs]


def publish(**values: str) -> Callable[[], Iterable[EntryPoint]]:
    return lambda: [EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP) for name, value in values.items()]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that can be imported and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"reward_module_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_function_of_prompt_and_output_scores_each_input_in_order() -> None:
    reward = wrap_callable("length", length)
    assert isinstance(reward, RewardModel)
    assert reward.name == "length"
    assert reward.score(inputs("abc", "", "ab")) == [3.0, 0.0, 2.0]


@pytest.mark.parametrize("scorer", [batch_lengths, Scaled(), Scaled])
def test_batch_functions_objects_and_classes_score_a_batch(scorer: object) -> None:
    assert wrap_callable("r", scorer).score(inputs("abc", "", "ab")) == [3.0, 0.0, 2.0]


def test_options_reach_functions_and_classes() -> None:
    assert wrap_callable("r", keyword_share, {"keyword": "b"}).score(inputs("abbb")) == [0.75]
    assert wrap_callable("r", Scaled, {"factor": 2.0}).score(inputs("abc")) == [6.0]


def test_numbers_of_numpy_and_truth_values_are_numbers() -> None:
    assert wrap_callable("r", lambda prompt, output: np.float32(0.5)).score(inputs("a")) == [0.5]
    assert wrap_callable("r", lambda inputs: np.array([1.5, 2.5])).score(inputs("a", "b")) == [1.5, 2.5]
    assert wrap_callable("r", lambda prompt, output: output == "a").score(inputs("a", "b")) == [1.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 10**400, None, "1.0", Decimal("1.0"), 1j, [1.0]])
def test_anything_but_a_finite_number_is_an_error_that_names_reward_and_position(bad: Any) -> None:
    reward = wrap_callable("picky", lambda prompt, output: bad if output == SECRET else 1.0)
    with pytest.raises(RewardError, match=r"'picky'.* for output 2 of 3") as caught:
        reward.score(inputs("a", SECRET, "b"))
    assert SECRET not in caught.value.message


@pytest.mark.parametrize("error", [ValueError(SECRET), KeyError(SECRET), SystemExit(SECRET), StopIteration(SECRET)])
def test_an_exception_is_a_reward_error_without_the_text(error: BaseException) -> None:
    def fail(prompt: str, output: str) -> float:
        if output == SECRET:
            raise error
        return 0.0

    with pytest.raises(RewardError) as caught:
        wrap_callable("fragile", fail).score(inputs("a", SECRET))
    assert caught.value.message == f"the reward 'fragile' raised {type(error).__name__} for output 2 of 2"
    assert caught.value.__cause__ is error


def test_a_batch_function_that_raises_or_miscounts_is_a_reward_error() -> None:
    def fail(inputs: Sequence[RewardInput]) -> list[float]:
        raise ValueError(SECRET)

    with pytest.raises(RewardError, match="'r' raised ValueError on a batch of 2 outputs"):
        wrap_callable("r", fail).score(inputs("a", "b"))
    with pytest.raises(RewardError, match="returned 1 scores for 2 outputs"):
        wrap_callable("r", lambda inputs: [1.0]).score(inputs("a", "b"))
    with pytest.raises(RewardError, match="raised TypeError"):
        wrap_callable("r", lambda inputs: 1.0).score(inputs("a"))


def test_an_entry_point_is_loaded_by_name(module: Callable[[str], str]) -> None:
    name = module("def f(prompt, output):\n    return len(output)\n")
    reward = load_callable("mine", "kind", lookup=publish(kind=f"{name}:f"))
    assert reward.name == "mine"
    assert reward.score(inputs("abc")) == [3.0]


def test_the_version_changes_with_the_source_of_the_module_only(module: Callable[[str], str]) -> None:
    def version(source: str) -> str:
        return load_callable("r", "f", lookup=publish(f=f"{module(source)}:f")).version

    source = "WORDS = {'good'}\ndef f(prompt, output):\n    return len(WORDS & set(output.split()))\n"
    assert version(source) == version(source)
    assert version(source) != version(source.replace("good", "kind"))


def test_an_explicit_version_wins_and_options_are_part_of_it() -> None:
    def f(prompt: str, output: str, scale: float = 1.0) -> float:
        return scale

    f.version = "2.1"  # type: ignore[attr-defined]
    assert wrap_callable("r", f).version == "2.1"
    versions = {wrap_callable("r", f, {"scale": s}).version for s in (1.0, 2.0)}
    assert len(versions) == 2
    assert all(v.startswith("2.1+") for v in versions)


def test_a_class_may_compute_its_version_for_each_object() -> None:
    class Model(Scaled):
        @property
        def version(self) -> str:
            return f"weights-{self.factor:g}"

    assert wrap_callable("r", Model).version == "weights-1"


@pytest.mark.parametrize("version", ["", "a@b", "x" * 65, "new\nline"])
def test_a_version_that_cannot_be_written_is_refused(version: str) -> None:
    scorer = Scaled()
    scorer.version = version  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequestError, match="version"):
        wrap_callable("r", scorer)


@pytest.mark.parametrize("scorer", [functools.partial(length, "p"), max])
def test_code_without_a_source_must_give_its_version(scorer: object) -> None:
    with pytest.raises(InvalidRequestError, match="attribute `version`"):
        wrap_callable("r", scorer)


async def async_length(prompt: str, output: str) -> float:
    return float(len(output))


async def async_lengths(inputs: Sequence[RewardInput], scale: float = 1.0) -> list[float]:
    return [scale * len(item.output) for item in inputs]


class AsyncLengths:
    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return await async_lengths(inputs)


class AsyncCallable:
    async def __call__(self, prompt: str, output: str) -> float:
        return await async_length(prompt, output)


@pytest.mark.parametrize("scorer", [async_length, async_lengths, AsyncLengths, AsyncLengths(), AsyncCallable()])
def test_async_code_is_awaited_on_the_event_loop(scorer: object) -> None:
    reward = wrap_callable("r", scorer)
    assert isinstance(reward, AsyncCallableReward)
    assert is_async(reward)
    assert asyncio.run(reward.score(inputs("abc", "", "ab"))) == [3.0, 0.0, 2.0]
    assert not is_async(wrap_callable("r", length))


def test_options_reach_async_code_and_its_errors_name_the_output() -> None:
    reward: Any = wrap_callable("r", async_lengths, {"scale": 2.0})
    assert asyncio.run(reward.score(inputs("abc"))) == [6.0]

    async def fail(prompt: str, output: str) -> float:
        if output == SECRET:
            raise ValueError(SECRET)
        return 0.0

    reward = wrap_callable("r", fail)
    with pytest.raises(RewardError) as caught:
        asyncio.run(reward.score(inputs("a", SECRET)))
    assert caught.value.message == "the reward 'r' raised ValueError for output 2 of 2"


@pytest.mark.parametrize("is_async_code", [False, True])
def test_code_can_say_that_it_may_pass(is_async_code: bool) -> None:
    error = RewardUnavailableError("busy", retry_after_s=3.0)

    def plain(prompt: str, output: str) -> float:
        raise error

    async def awaited(prompt: str, output: str) -> float:
        raise error

    reward: Any = wrap_callable("r", awaited if is_async_code else plain)
    with pytest.raises(RewardUnavailableError) as caught:
        asyncio.run(reward.score(inputs("a"))) if is_async_code else reward.score(inputs("a"))
    assert caught.value is error


class _NoScore:
    pass


class _Broken:
    def __init__(self) -> None:
        raise OSError("no weights")


@pytest.mark.parametrize(
    ("scorer", "options", "message"),
    [
        (lambda: 0.0, {}, r"must take \(prompt, output\) or \(inputs\)"),
        (lambda a, b, c: 0.0, {}, r"must take \(prompt, output\) or \(inputs\)"),
        (length, {"keyword": "a"}, r"and the options \['keyword'\]"),
        (Scaled(), {"factor": 2.0}, "takes no options"),
        (Scaled, {"nonsense": 2.0}, r"cannot be made with options \['nonsense'\]"),
        (_NoScore, {}, r"is _NoScore; it must be .* a method score\(inputs\)"),
        (_Broken, {}, "OSError: no weights"),
    ],
)
def test_what_cannot_score_is_refused_when_it_is_loaded(scorer: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        wrap_callable("r", scorer, options)


def test_a_value_that_is_no_code_is_refused(module: Callable[[str], str]) -> None:
    with pytest.raises(InvalidRequestError, match="is int; it must be a function"):
        load_callable("r", "f", lookup=publish(f=f"{module('f = 3')}:f"))


@pytest.mark.parametrize(
    ("source", "message"),
    [("import no_such_package_here", "ModuleNotFoundError"), ("raise SystemExit(3)", "SystemExit")],
)
def test_an_entry_point_that_cannot_be_imported_is_refused(
    module: Callable[[str], str], source: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"'f' .* cannot be imported: {message}"):
        load_callable("r", "f", lookup=publish(f=f"{module(source)}:f"))


def test_an_unknown_entry_point_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"'no'.*known: one, two"):
        load_callable("r", "no", lookup=publish(two="m:f", one="m:g"))


def test_an_entry_point_of_two_packages_is_refused_unless_it_is_the_same_object() -> None:
    def twice(other: str) -> Callable[[], Iterable[EntryPoint]]:
        return lambda: [*publish(f="math:fabs")(), *publish(f=other)()]

    with pytest.raises(InvalidRequestError, match="ambiguous: math:fabs, math:sqrt"):
        load_callable("r", "f", lookup=twice("math:sqrt"))
    with pytest.raises(InvalidRequestError, match="attribute `version`"):  # Found, and refused for its own reason.
        load_callable("r", "f", lookup=twice("math:fabs"))
