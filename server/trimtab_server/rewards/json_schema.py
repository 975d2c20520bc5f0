"""Rewards for outputs that are JSON of a given schema."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal, Self

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from pydantic import Field, JsonValue
from referencing.exceptions import Unresolvable

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.constraint_share import SchemaConstraints
from trimtab_server.rewards.limits import RewardLimits, options_hash, parse_options

_FENCE = "```"


class JsonSchemaOptions(RewardLimits):
    """The `options` of a reward of kind `json_schema`."""

    json_schema: dict[str, JsonValue] = Field(alias="schema")
    """The schema; draft 2020-12 unless `$schema` says otherwise. References may only point into it."""
    value: Literal["valid", "share"] = "valid"
    """1 for JSON that fits and 0 for anything else, or the share of the schema's constraints that hold."""
    source: Literal["text", "fenced"] = "text"
    """What must be JSON: the whole output, or what is in its first block fenced by three backticks."""


class JsonSchemaReward:
    """Parses the output and validates it. What is not JSON has 0, whatever the schema.

    Args:
        name: Name of the reward.
        options: See `JsonSchemaOptions`.

    Raises:
        InvalidRequestError: The schema is none, or it cannot be used here.
    """

    def __init__(self, name: str, options: JsonSchemaOptions) -> None:
        self._name = name
        self._options = options
        schema: dict[str, Any] = dict(options.json_schema)
        base = validator_for(schema)
        try:
            base.check_schema(schema)
        except SchemaError as exc:
            raise InvalidRequestError(
                f"this is no JSON schema: {exc.message} at {exc.json_path}", param="options.schema"
            ) from exc
        self._constraints = SchemaConstraints(name, base, schema)
        self._version = options_hash(options, version("jsonschema"))

    @classmethod
    def load(cls, spec: RewardSpec) -> Self:
        """Make it as registered. Raises `InvalidRequestError`."""
        return cls(spec.name, parse_options(JsonSchemaOptions, spec, has_target=False))

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._version

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One number in [0, 1] per input.

        Raises:
            RewardError: A value could not be validated, such as one nested too deeply.
        """
        return [self._value(item.output, f"output {i} of {len(inputs)}") for i, item in enumerate(inputs, start=1)]

    def _value(self, text: str, where: str) -> float:
        source = text if self._options.source == "text" else first_fenced_block(text)
        try:
            value = parse_json(source) if source is not None else None
        except ValueError:
            return 0.0
        if source is None:
            return 0.0
        try:
            held, total = self._constraints.count(value)
        except (RecursionError, Unresolvable) as exc:
            raise RewardError(f"the reward {self._name!r} cannot validate {where}: {type(exc).__name__}") from exc
        return float(held == total) if self._options.value == "valid" else held / total if total else 1.0


def parse_json(text: str) -> Any:
    """A JSON value, and nothing that only Python takes for one. Raises `ValueError`; also when nested too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def first_fenced_block(text: str) -> str | None:
    """What stands between the first line that begins with three backticks and the next one; None without such a block.

    A word after the opening backticks names the language and is left out.
    """
    lines = text.splitlines(keepends=True)
    begin = next((i for i, line in enumerate(lines) if line.lstrip().startswith(_FENCE)), None)
    if begin is None:
        return None
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].lstrip().startswith(_FENCE)), None)
    return None if end is None else "".join(lines[begin + 1 : end])


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")
