"""Rewards from the sentiment lexicon VADER, which was made for short English texts."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.limits import RewardLimits, options_hash, parse_options


class SentimentOptions(RewardLimits):
    """The `options` of a reward of kind `sentiment`."""

    value: Literal["compound", "pos", "neg"] = "compound"
    """VADER's sum of word valences in [-1, 1], or the share of positive or of negative words in [0, 1]."""
    label: Literal["positive", "negative"] = "positive"
    """Which sentiment is wanted: for the negative one the reward is minus the value."""


class SentimentReward:
    """Sentiment of the output by the words in it. A text without any such word, the empty one too, has 0.

    Args:
        name: Name of the reward.
        options: See `SentimentOptions`.
    """

    def __init__(self, name: str, options: SentimentOptions) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 - reads its lexicon

        self._name = name
        self._options = options
        self._analyzer: Any = SentimentIntensityAnalyzer()
        self._version = options_hash(options, version("vaderSentiment"))

    @classmethod
    def load(cls, spec: RewardSpec) -> "SentimentReward":
        """Make it as registered. Raises `InvalidRequestError`."""
        return cls(spec.name, parse_options(SentimentOptions, spec, has_target=False))

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._version

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One number per input."""
        sign = 1.0 if self._options.label == "positive" else -1.0
        return [sign * self._analyzer.polarity_scores(item.output)[self._options.value] for item in inputs]
