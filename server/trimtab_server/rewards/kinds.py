"""Builds a reward of any kind but `composite` from its registration."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping

import httpx

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import AsyncRewardModel, RewardSpec
from trimtab_server.rewards.attempts import AnyReward
from trimtab_server.rewards.callable import EntryPointLookup, load_callable
from trimtab_server.rewards.classifier import ClassifierOptions, ClassifierReward
from trimtab_server.rewards.endpoint import build_reward_client
from trimtab_server.rewards.http import HttpOptions, HttpReward
from trimtab_server.rewards.json_schema import JsonSchemaReward
from trimtab_server.rewards.keywords import KeywordReward
from trimtab_server.rewards.limits import LIMIT_NAMES, RewardLimits, parse_limits
from trimtab_server.rewards.llm_judge import JudgeOptions, JudgeReward
from trimtab_server.rewards.regex_match import RegexReward
from trimtab_server.rewards.sentiment import SentimentReward

Builder = Callable[[RewardSpec], AnyReward | Awaitable[AnyReward]]
"""Builds a reward: a plain function in a worker thread, an `async` one on the event loop.

Raises `InvalidRequestError` or `RewardError` when it cannot.
"""

_LIMITS: dict[str, type[RewardLimits]] = {
    "hf_classifier": ClassifierOptions,
    "http": HttpOptions,
    "llm_judge": JudgeOptions,
}
"""Kinds whose limits have defaults of their own."""


class RewardKinds:
    """What rewards are built with: the entry points, keys for servers, and one HTTP client for all of them.

    Args:
        entry_points: Lists the entry points.
        environment: Where keys of servers are looked up.
        builders: Further kinds of rewards, or replacements, by kind.
    """

    def __init__(
        self,
        *,
        entry_points: EntryPointLookup,
        environment: Mapping[str, str],
        builders: Mapping[str, Builder],
    ) -> None:
        self._entry_points = entry_points
        self._environment = environment
        self._client: httpx.AsyncClient | None = None
        self._builders: dict[str, Builder] = {
            "callable": self._callable,
            "hf_classifier": ClassifierReward.load,
            "http": self._http,
            "json_schema": JsonSchemaReward.load,
            "keywords": KeywordReward.load,
            "llm_judge": self._llm_judge,
            "regex": RegexReward.load,
            "sentiment": SentimentReward.load,
            **builders,
        }

    async def build(self, spec: RewardSpec) -> tuple[AnyReward, RewardLimits]:
        """The reward, tried out where that costs little, and its limits.

        Raises:
            InvalidRequestError: It cannot be built as registered.
            RewardError: Something that it needs is away.
        """
        builder = self._builders.get(spec.kind)
        if builder is None:
            raise InvalidRequestError(
                f"rewards of kind {spec.kind!r} cannot be built here; known kinds: {', '.join(sorted(self._builders))}",
                param="kind",
            )
        limits = parse_limits(_LIMITS.get(spec.kind, RewardLimits), spec)
        built = builder(spec) if inspect.iscoroutinefunction(builder) else await asyncio.to_thread(builder, spec)
        return (await built if inspect.isawaitable(built) else built), limits

    async def aclose(self) -> None:
        """Close connections to servers."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _http_client(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = build_reward_client()
        return self._client

    def _callable(self, spec: RewardSpec) -> AnyReward:
        options = {name: value for name, value in spec.options.items() if name not in LIMIT_NAMES}
        return load_callable(spec.name, spec.target, options, lookup=self._entry_points)

    async def _http(self, spec: RewardSpec) -> AsyncRewardModel:
        return await HttpReward.load(spec, self._http_client(), self._environment)

    async def _llm_judge(self, spec: RewardSpec) -> AsyncRewardModel:
        return await JudgeReward.load(spec, self._http_client(), self._environment)
