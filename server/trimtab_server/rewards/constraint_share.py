"""How many of a JSON schema's constraints a value keeps."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jsonschema import ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_server.rewards.timed_pattern import TimedPattern

_Check = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]

_DESCENDS = frozenset(
    (
        "$ref",
        "$dynamicRef",
        "allOf",
        "properties",
        "items",
        "prefixItems",
        "additionalItems",
        "dependentSchemas",
        "format",
    )
)
"""Keywords that say nothing of their own: what they lead to is counted, and `format` is a remark."""

_UNBOUNDED = frozenset(("patternProperties", "$recursiveRef"))
_MATCH_TIMEOUT_S = 1.0


class SchemaConstraints:
    """Counts constraints: each assertion of the schema at each place of the value that validation reaches.

    A name in `required` is one constraint; `anyOf`, `oneOf`, `not`, `if`, `contains` and the like are one each,
    whatever is in them. What is below a property that is missing is not reached and not counted.

    Args:
        reward: Name of the reward, for messages.
        base: The validator of the schema's draft.
        schema: Checked against its own draft.

    Raises:
        InvalidRequestError: It refers to something outside of itself, or has a keyword or pattern that cannot be used.
    """

    def __init__(self, reward: str, base: type[Validator], schema: Mapping[str, Any]) -> None:
        self._reward = reward
        self._patterns: dict[str, TimedPattern] = {}
        self._references: set[str] = set()
        self._examine(schema)
        self._held = self._total = 0
        self._is_inside = False
        checks = {**base.VALIDATORS, "pattern": self._check_pattern}
        counted: dict[str, Any] = {
            keyword: check if keyword in _DESCENDS else self._counting(keyword, check)
            for keyword, check in checks.items()
        }
        # An empty registry of our own: the default one would fetch what a schema refers to.
        self._validator = extend(base, counted)(schema, registry=Registry())  # type: ignore[no-untyped-call]
        self._check_references(schema)

    def count(self, value: Any) -> tuple[int, int]:
        """How many constraints hold, and how many there are. Not for several threads at a time."""
        self._held = self._total = 0
        self._is_inside = False
        for _ in self._validator.iter_errors(value):
            pass
        return self._held, self._total

    def _counting(self, keyword: str, check: _Check) -> _Check:
        def counted(validator: Any, expected: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            if self._is_inside:
                yield from check(validator, expected, instance, schema) or ()
                return
            self._is_inside = True
            try:
                errors = list(check(validator, expected, instance, schema) or ())
            finally:
                self._is_inside = False
            num = len(expected) if keyword == "required" and isinstance(instance, dict) else 1
            self._total += num
            self._held += num - min(num, len(errors))
            yield from errors

        return counted

    def _check_pattern(self, validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not self._patterns[pattern].is_match(instance):
            yield ValidationError("does not match")

    def _check_references(self, schema: Mapping[str, Any]) -> None:
        resolver = Registry().resolver_with_root(DRAFT202012.create_resource(dict(schema)))
        for reference in self._references:
            try:
                resolver.lookup(reference)
            except Unresolvable as exc:
                raise InvalidRequestError(
                    f"the schema refers to {reference!r}, which it does not have", param="options.schema"
                ) from exc

    def _examine(self, node: Any) -> None:
        """Find patterns, and refuse what would fetch, or could run without end."""
        param = "options.schema"
        if isinstance(node, dict):
            for keyword, value in node.items():
                if keyword in ("$ref", "$dynamicRef") and isinstance(value, str):
                    if not value.startswith("#"):
                        raise InvalidRequestError("the schema may only refer to its own parts: '#/...'", param=param)
                    self._references.add(value)
                if keyword in _UNBOUNDED and isinstance(value, dict | str):
                    raise InvalidRequestError(f"the keyword {keyword!r} cannot be used here", param=param)
                if keyword == "pattern" and isinstance(value, str):
                    self._patterns[value] = TimedPattern(self._reward, value, timeout_s=_MATCH_TIMEOUT_S, param=param)
                self._examine(value)
        elif isinstance(node, list):
            for item in node:
                self._examine(item)
