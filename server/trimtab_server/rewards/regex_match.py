"""Rewards from a regular expression."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

from pydantic import Field

from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.limits import RewardLimits, options_hash, parse_options
from trimtab_server.rewards.timed_pattern import TimedPattern


class RegexOptions(RewardLimits):
    """The `options` of a reward of kind `regex`."""

    match: Literal["search", "full"] = "search"
    """Whether a match may be anywhere, or must be the whole output."""
    value: Literal["indicator", "count"] = "indicator"
    """1 for a match and 0 for none, or the number of matches that do not overlap; a full match is one."""
    sign: Literal["reward", "penalty"] = "reward"
    """A penalty is minus that value."""
    flags: list[Literal["ignore_case", "multi_line", "dot_all"]] = Field(default_factory=list)
    match_timeout_s: float = Field(default=1.0, gt=0, le=60)
    """Most time for one output; a pattern that takes longer is an error."""


class RegexReward:
    """Looks for a pattern in the output.

    Args:
        name: Name of the reward.
        pattern: What is looked for.
        options: See `RegexOptions`.
    """

    def __init__(self, name: str, pattern: str, options: RegexOptions) -> None:
        self._name = name
        self._options = options
        self._pattern = TimedPattern(
            name, pattern, flags=options.flags, timeout_s=options.match_timeout_s, param="target"
        )
        self._version = options_hash(options, pattern, version("regex"))

    @classmethod
    def load(cls, spec: RewardSpec) -> "RegexReward":
        """Make it as registered. Raises `InvalidRequestError`."""
        return cls(spec.name, spec.target, parse_options(RegexOptions, spec, has_target=True))

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._version

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One number per input. Raises `RewardError` when the pattern takes too long."""
        sign = 1.0 if self._options.sign == "reward" else -1.0
        return [sign * self._value(item.output) for item in inputs]

    def _value(self, text: str) -> float:
        if self._options.match == "full":
            return float(self._pattern.is_full_match(text))
        if self._options.value == "count":
            return float(self._pattern.count(text))
        return float(self._pattern.is_match(text))
