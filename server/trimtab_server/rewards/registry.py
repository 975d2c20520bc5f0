"""The rewards that requests, routes and jobs can name."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from pydantic import ValidationError

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError, RewardError
from trimtab_adapters.contract.rewards import RewardChoice, RewardMix, RewardModel, RewardSpec
from trimtab_server.rewards.batching import BatchedReward
from trimtab_server.rewards.callable import CallableReward, EntryPointLookup, installed_entry_points
from trimtab_server.rewards.classifier import ClassifierReward
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.base import RewardSpecs

logger = logging.getLogger(__name__)

Builder = Callable[[RewardSpec], RewardModel]
"""Builds a reward, in a worker thread. Raises `InvalidRequestError` when it cannot."""


class MemoryRewardSpecs:
    """`RewardSpecs` that live as long as the process."""

    def __init__(self, specs: Sequence[RewardSpec] = ()) -> None:
        self._specs = {spec.name: spec for spec in specs}

    async def list(self) -> Sequence[RewardSpec]:
        """All of them."""
        return tuple(self._specs.values())

    async def put(self, spec: RewardSpec) -> None:
        """Add or replace by name."""
        self._specs[spec.name] = spec


class RewardRegistry:
    """Finds rewards by name and builds each when it is first asked for.

    Registered specs come first; an entry point of the group `trimtab.rewards` is available under its own name without
    registration. A spec that another process has replaced is seen at the next request, because specs are read from
    their store each time.

    Args:
        specs: Where registered rewards are kept, or a plain list of them.
        entry_points: Lists the entry points; read once, since installing a package needs a restart.
        builders: Further kinds of rewards, or replacements, by kind.
    """

    def __init__(
        self,
        specs: RewardSpecs | Sequence[RewardSpec] = (),
        *,
        entry_points: EntryPointLookup = installed_entry_points,
        builders: Mapping[str, Builder] | None = None,
    ) -> None:
        self._specs: RewardSpecs = MemoryRewardSpecs(specs) if isinstance(specs, Sequence) else specs
        self._find_entry_points = entry_points
        self._builders: dict[str, Builder] = {
            "callable": self._build_callable,
            "hf_classifier": ClassifierReward.load,
            **(builders or {}),
        }
        self._entry_point_specs: dict[str, RewardSpec] | None = None
        self._built: dict[str, tuple[RewardSpec, BatchedReward]] = {}
        self._building: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, name: str) -> RewardModel:
        """The reward itself, for callers that score from a thread of their own.

        Raises:
            NotFoundError: Nothing of that name is registered or installed.
            RewardError: It is registered but cannot be loaded here.
        """
        return (await self.batched(name)).model

    async def batched(self, name: str) -> BatchedReward:
        """The reward behind its queue, for the request path. One per name and version of the spec.

        Raises:
            NotFoundError: Nothing of that name is registered or installed.
            RewardError: It is registered but cannot be loaded here.
        """
        specs = await self._all()
        if name not in specs:
            known = ", ".join(sorted(specs)) or "none"
            raise NotFoundError(
                f"the reward {name!r} does not exist; known rewards: {known}", param="reward", code="reward_not_found"
            )
        spec = specs[name]
        if (ready := self._ready(spec)) is not None:
            return ready
        async with self._building[name]:
            if (ready := self._ready(spec)) is not None:
                return ready
            try:
                built = await self._build(spec)
            except InvalidRequestError as exc:
                # The reason may name paths of this machine, and whoever asked cannot mend it.
                logger.error("the reward %r cannot be loaded: %s", name, exc.message)
                raise RewardError(
                    f"the reward {name!r} is registered but cannot be loaded; the gateway's log has the reason"
                ) from exc
            self._built[name] = (spec, built)
            return built

    async def resolve(self, choice: RewardChoice) -> ResolvedReward:
        """One version of each reward that a choice names.

        Raises:
            NotFoundError: Nothing of a name is registered or installed.
            RewardError: One is registered but cannot be loaded here.
        """
        if isinstance(choice, RewardMix):
            raise InvalidRequestError("several rewards cannot be combined yet", param="reward")
        reward = await self.batched(choice)
        return ResolvedReward(name=reward.name, version=reward.version, parts=(reward,))

    async def list(self) -> Sequence[RewardSpec]:
        """All rewards that can be named, registered or installed, in the order of their names."""
        return [spec for _, spec in sorted((await self._all()).items())]

    async def add(self, spec: RewardSpec) -> RewardModel:
        """Register a reward, or replace the one of the same name; it is built first, so that a bad one is refused.

        Raises:
            InvalidRequestError: It cannot be built; nothing has changed.
            StorageError: It could not be stored; nothing has changed.
        """
        async with self._building[spec.name]:
            built = await self._build(spec)
            await self._specs.put(spec)
            self._built[spec.name] = (spec, built)
            return built.model

    async def _all(self) -> dict[str, RewardSpec]:
        if self._entry_point_specs is None:
            self._entry_point_specs = await asyncio.to_thread(self._specs_of_entry_points)
        return self._entry_point_specs | {spec.name: spec for spec in await self._specs.list()}

    def _specs_of_entry_points(self) -> dict[str, RewardSpec]:
        specs = {}
        for point in self._find_entry_points():
            try:
                specs[point.name] = RewardSpec(name=point.name, kind="callable", target=point.name)
            except ValidationError:
                logger.warning("the entry point %r cannot be named as a reward; register it under a name", point.name)
        return specs

    def _ready(self, spec: RewardSpec) -> BatchedReward | None:
        known_spec, built = self._built.get(spec.name, (None, None))
        return built if known_spec == spec else None

    async def _build(self, spec: RewardSpec) -> BatchedReward:
        builder = self._builders.get(spec.kind)
        if builder is None:
            raise InvalidRequestError(
                f"rewards of kind {spec.kind!r} cannot be built here; known kinds: {', '.join(sorted(self._builders))}",
                param="kind",
            )
        return BatchedReward(await asyncio.to_thread(builder, spec))

    def _build_callable(self, spec: RewardSpec) -> RewardModel:
        return CallableReward.load(spec.name, spec.target, spec.options, lookup=self._find_entry_points)
