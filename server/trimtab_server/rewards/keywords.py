"""Rewards for texts that use given keywords."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.coverage import (
    WordKeys,
    binary_coverage,
    coverage,
    first_appearances,
    is_same,
    ordered_coverage,
)
from trimtab_server.rewards.limits import RewardLimits, options_hash, parse_options
from trimtab_server.rewards.timed_pattern import TimedPattern

MAX_KEYWORDS = 256

_MEASURES: dict[str, Callable[[Sequence[int | None]], float]] = {
    "coverage": coverage,
    "ordered": ordered_coverage,
    "binary": binary_coverage,
}
_PUNCTUATION = "".join(map(chr, range(33, 48))) + ":;<=>?@[\\]^_`{|}~«»„“”‘’…–—¿¡"
_MATCH_TIMEOUT_S = 1.0


class KeywordOptions(RewardLimits):
    """The `options` of a reward of kind `keywords`."""

    keywords: list[str] | None = Field(default=None, min_length=1, max_length=MAX_KEYWORDS)
    """The keywords, in the wanted order; each may have several words."""
    prompt_pattern: str | None = None
    """Instead of them: a regular expression with one group, which finds them in the prompt."""
    separator: str = Field(default=",", min_length=1, max_length=16)
    """What stands between them in the prompt."""
    measure: Literal["coverage", "ordered", "binary"] = "coverage"
    """Share of keywords that appear; share that appear in the wanted order, up to the first that does not; or 1 when
    all appear in the wanted order, else 0."""
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}$")
    """Language whose lemmas are compared, as simplemma names it."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.keywords is None) == (self.prompt_pattern is None):
            raise ValueError("options.keywords or options.prompt_pattern is needed, and not both")
        return self


class KeywordReward:
    """Compares the words of the output with keywords. Two words are the same when they, or their lemmas, are.

    Args:
        name: Name of the reward.
        options: See `KeywordOptions`.

    Raises:
        InvalidRequestError: The language is not known, the pattern has not one group, or a keyword has no word.
    """

    def __init__(self, name: str, options: KeywordOptions) -> None:
        import simplemma  # noqa: PLC0415 - it opens its dictionaries

        self._name = name
        self._options = options
        self._lemmatizer = simplemma.Lemmatizer()
        self._version = options_hash(options, version("simplemma"))
        try:
            self._keys("word")
        except ValueError as exc:
            raise InvalidRequestError(str(exc), param="options.language") from exc
        self._pattern: TimedPattern | None = None
        self._keywords: list[list[WordKeys]] = []
        if options.prompt_pattern is not None:
            self._pattern = TimedPattern(
                name, options.prompt_pattern, timeout_s=_MATCH_TIMEOUT_S, param="options.prompt_pattern"
            )
            if self._pattern.num_groups != 1:
                raise InvalidRequestError("the pattern must have one group", param="options.prompt_pattern")
        else:
            self._keywords = self._parse(options.keywords or [])
            if len(self._keywords) < len(options.keywords or []):
                raise InvalidRequestError(
                    "each keyword must have a letter or digit and stand for another word than the others",
                    param="options.keywords",
                )

    @classmethod
    def load(cls, spec: RewardSpec) -> Self:
        """Make it as registered. Raises `InvalidRequestError`."""
        return cls(spec.name, parse_options(KeywordOptions, spec, has_target=False))

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._version

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One number in [0, 1] per input. Raises `RewardError` when a prompt names no keywords."""
        measure = _MEASURES[self._options.measure]
        return [
            measure(first_appearances(self._wanted(item, position, len(inputs)), self._words(item.output)))
            for position, item in enumerate(inputs, start=1)
        ]

    def _wanted(self, item: RewardInput, position: int, num_inputs: int) -> list[list[WordKeys]]:
        if self._pattern is None:
            return self._keywords
        listed = (self._pattern.find_group(item.prompt) or "").split(self._options.separator)
        keywords = self._parse(listed) if len(listed) <= MAX_KEYWORDS else []
        if not keywords:
            raise RewardError(
                f"the reward {self._name!r} needs 1 to {MAX_KEYWORDS} keywords, and the prompt of output {position} of "
                f"{num_inputs} does not name them"
            )
        return keywords

    def _parse(self, keywords: Sequence[str]) -> list[list[WordKeys]]:
        """Keywords as their words; those without any word and repetitions left out."""
        parsed: list[list[WordKeys]] = []
        for keyword in keywords:
            words = self._words(keyword)
            if words and not any(is_same(words, other) for other in parsed):
                parsed.append(words)
        return parsed

    def _words(self, text: str) -> list[WordKeys]:
        stripped = (token.strip(_PUNCTUATION) for token in text.split())
        return [self._keys(token) for token in stripped if token]

    def _keys(self, token: str) -> WordKeys:
        lemma = self._lemmatizer.lemmatize(token, self._options.language)
        return frozenset((token.casefold(), lemma.casefold()))
