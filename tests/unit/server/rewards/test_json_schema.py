"""Rewards for JSON that fits a schema."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.json_schema import JsonSchemaReward, first_fenced_block

PERSON: dict[str, Any] = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string", "minLength": 2}, "age": {"type": "integer", "minimum": 0}},
}


def load(schema: Any, **options: Any) -> JsonSchemaReward:
    return JsonSchemaReward.load(RewardSpec(name="form", kind="json_schema", options={"schema": schema, **options}))


def scores(schema: Any, *outputs: str, **options: Any) -> list[float]:
    return load(schema, **options).score([RewardInput("", output) for output in outputs])


def test_json_that_fits_has_one_and_anything_else_zero() -> None:
    outputs = ('{"name": "Ada", "age": 36}', ' {"name": "Ada", "age": 36}\n', '{"name": "Ada"}', "36", "no JSON", "")
    assert scores(PERSON, *outputs) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "output", ["NaN", "Infinity", '{"a": NaN}', "{'a': 1}", "[1,]", "1 2", "[" * 100_000, "9" * 10_000, "\ud83d"]
)
def test_what_only_python_takes_for_json_is_none(output: str) -> None:
    assert scores({}, output) == [0.0]


def test_null_is_json() -> None:
    assert scores({"type": "null"}, "null", "") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("output", "held", "total"),
    [
        # type, two of required; of name: type, minLength; of age: type, minimum
        ('{"name": "Ada", "age": 36}', 7, 7),
        ('{"name": "A", "age": 36}', 6, 7),
        ('{"name": "A", "age": -1}', 5, 7),
        ('{"name": 1, "age": "x"}', 5, 7),  # minLength and minimum say nothing of other types
        # A property that is missing is not reached: type, two of required, and two of name.
        ('{"name": "Ada"}', 4, 5),
        ("{}", 1, 3),
        # required says nothing of other types
        ("3", 1, 2),
    ],
)
def test_the_share_counts_each_constraint_where_validation_comes_to_it(output: str, held: int, total: int) -> None:
    assert scores(PERSON, output, value="share") == [pytest.approx(held / total)]


@pytest.mark.parametrize(
    ("schema", "output", "held", "total"),
    [
        # What is inside of anyOf counts as one, however much it is.
        ({"anyOf": [{"type": "string", "minLength": 3}, {"type": "integer"}], "minimum": 5}, "4", 1, 2),
        ({"not": {"type": "string"}, "minLength": 9}, '"ab"', 0, 2),
        # Each item is a place of its own.
        ({"items": {"type": "integer", "maximum": 2}, "maxItems": 2}, "[1, 2, 3]", 5, 7),
        # References and allOf are looked through.
        ({"$ref": "#/$defs/small", "$defs": {"small": {"maximum": 2, "type": "integer"}}}, "3", 1, 2),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, "3", 1, 2),
        ({"format": "email", "type": "string"}, '"x"', 1, 1),
        ({}, "3", 1, 1),  # nothing is asked for, and that holds
    ],
)
def test_the_share_of_combined_constraints(schema: Any, output: str, held: int, total: int) -> None:
    assert scores(schema, output, value="share") == [pytest.approx(held / total)]


def test_the_share_of_one_output_does_not_depend_on_another() -> None:
    bad, good = '{"name": 1}', '{"name": "Ada", "age": 36}'
    alone = scores(PERSON, bad, value="share") + scores(PERSON, good, value="share")
    assert scores(PERSON, bad, good, bad, value="share") == [*alone, alone[0]]


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("Sure:\n```json\n{}\n```\nDone", "{}\n"),
        ("```\n1\n```\n```\n2\n```", "1\n"),
        ("  ```json\n{}\n  ```", "{}\n"),
        ("```json\n{}", None),
        ("{}", None),
        ("``` {} ```", None),
        ("", None),
    ],
)
def test_the_first_fenced_block_is_found(text: str, block: str | None) -> None:
    assert first_fenced_block(text) == block


def test_a_fenced_block_can_be_what_is_judged() -> None:
    outputs = ("Here:\n```json\n[1]\n```", "[1]", "```\n[1\n```")
    assert scores({"type": "array"}, *outputs, source="fenced") == [1.0, 0.0, 0.0]
    assert scores({"type": "array"}, *outputs) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "thing"},
        {"minimum": "x"},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"properties": {"a": {"$ref": "other.json"}}},
        {"$ref": "#/$defs/missing"},
        {"patternProperties": {"^a": {}}},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        load(schema)
    assert caught.value.param == "options.schema"


@pytest.mark.parametrize(
    ("options", "param"),
    [({"schema": True}, "options.schema"), ({}, "options.schema"), ({"schema": {}, "value": "x"}, "options.value")],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        JsonSchemaReward.load(RewardSpec(name="form", kind="json_schema", options=options))
    assert caught.value.param == param


def test_a_property_may_be_called_like_a_keyword() -> None:
    schema = {"properties": {"pattern": {"pattern": "^a"}, "$ref": {"type": "string"}}}
    assert scores(schema, '{"pattern": "ab", "$ref": "x"}', '{"pattern": "b"}') == [1.0, 0.0]


def test_a_pattern_in_a_schema_cannot_hang_the_gateway() -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match="'form' took longer than 1 s"):
        scores({"pattern": r"^(?:(?:a|aa)+)+$"}, '"' + "a" * 60 + 'b"')
    assert time.monotonic() - started < 10.0


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Python's own: torch's compiler, for one, leaves a higher one behind."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("usual_recursion_limit")
def test_a_value_that_cannot_be_validated_is_an_error() -> None:
    nested = "[" * 400 + "]" * 400
    with pytest.raises(RewardError, match="cannot validate output 2 of 2: RecursionError"):
        scores({"items": {"$ref": "#"}}, "[[]]", nested)


def test_the_version_follows_the_schema() -> None:
    assert load({"minimum": 1}).version == load({"minimum": 1}, cache_size=0).version != load({"minimum": 2}).version
