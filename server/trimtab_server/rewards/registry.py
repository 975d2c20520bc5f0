"""The rewards that requests, routes and jobs can name."""

import asyncio
import builtins
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from trimtab_adapters.contract.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    RequestError,
    RewardError,
    RewardUnavailableError,
)
from trimtab_adapters.contract.rewards import RewardChoice, RewardMix, RewardSpec
from trimtab_server.rewards.attempts import AnyReward
from trimtab_server.rewards.batching import BatchedReward, RewardObserver, RewardState
from trimtab_server.rewards.callable import EntryPointLookup, installed_entry_points
from trimtab_server.rewards.composite import combine_parts, parse_mix
from trimtab_server.rewards.kinds import Builder, RewardKinds
from trimtab_server.rewards.pinned import PinnedReward
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.base import RewardSpecs

logger = logging.getLogger(__name__)

_FAILURE_KEPT_S = 5.0
"""How long a reward that could not be built is not tried again, so that requests for it do not queue up."""


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What is known of a named reward.

    Attributes:
        spec: As registered.
        version: None when it cannot be built now.
        state: Of its breaker and cache; None for a composite, whose parts have them.
        error: Why it cannot be built.
    """

    spec: RewardSpec
    version: str | None
    state: RewardState | None = None
    error: str | None = None


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

    async def delete(self, name: str) -> bool:
        """Whether there was one of that name."""
        return self._specs.pop(name, None) is not None


class RewardRegistry:
    """Finds rewards by name and builds each when it is first asked for.

    Registered specs come first; an entry point of the group `trimtab.rewards` is available under its own name without
    registration. A spec that another process has replaced is seen at the next request, because specs are read from
    their store each time.

    Args:
        specs: Where registered rewards are kept, or a plain list of them.
        entry_points: Lists the entry points; read once, since installing a package needs a restart.
        builders: Further kinds of rewards, or replacements, by kind.
        environment: Where keys of servers are looked up.
        observer: Is told of every attempt and call.
    """

    def __init__(
        self,
        specs: RewardSpecs | Sequence[RewardSpec] = (),
        *,
        entry_points: EntryPointLookup = installed_entry_points,
        builders: Mapping[str, Builder] | None = None,
        environment: Mapping[str, str] | None = None,
        observer: RewardObserver | None = None,
    ) -> None:
        self._specs: RewardSpecs = MemoryRewardSpecs(specs) if isinstance(specs, Sequence) else specs
        self._find_entry_points = entry_points
        self._kinds = RewardKinds(entry_points=entry_points, environment=environment or {}, builders=builders or {})
        self._observer = observer
        self._entry_point_specs: dict[str, RewardSpec] | None = None
        self._built: dict[str, tuple[RewardSpec, BatchedReward]] = {}
        self._failed: dict[str, tuple[RewardSpec, bool, float]] = {}
        self._building: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, name: str) -> AnyReward:
        """The reward itself, without its queue.

        Raises:
            NotFoundError: Nothing of that name is registered or installed.
            InvalidRequestError: It is a composite.
            RewardError: It is registered but cannot be loaded here.
        """
        return (await self.batched(name)).model

    async def batched(self, name: str) -> BatchedReward:
        """The reward behind its queue, for the request path. One per name and version of the spec.

        Raises:
            NotFoundError: Nothing of that name is registered or installed.
            InvalidRequestError: It is a composite, which has scores only beside other outputs of the same prompt.
            RewardError: It is registered but cannot be loaded here.
        """
        return await self._batched(_named(await self._all(), name))

    async def resolve(self, choice: RewardChoice) -> ResolvedReward:
        """One version of each reward that a choice names; its parts give scores of that version, or an error.

        Raises:
            NotFoundError: Nothing of a name is registered or installed.
            InvalidRequestError: A part of a mix is a composite itself.
            RewardError: One is registered but cannot be loaded here.
        """
        specs = await self._all()
        if isinstance(choice, RewardMix):
            name, mix = choice.name, choice
        else:
            spec = _named(specs, choice)
            if spec.kind != "composite":
                reward = PinnedReward(await self._batched(spec))
                return ResolvedReward(name=reward.name, version=reward.version, parts=(reward,))
            name, mix = choice, parse_mix(spec)
        parts = [_part(specs, part) for part in mix.weights]
        return combine_parts(name, mix, [PinnedReward(await self._batched(part)) for part in parts])

    async def list(self) -> Sequence[RewardSpec]:
        """All rewards that can be named, registered or installed, in the order of their names."""
        return [spec for _, spec in sorted((await self._all()).items())]

    async def report(self, name: str) -> RewardReport:
        """What is known of one; it is built for that where it is not yet.

        Raises:
            NotFoundError: Nothing of that name is registered or installed.
        """
        spec = _named(await self._all(), name)
        try:
            if spec.kind == "composite":
                return RewardReport(spec, (await self.resolve(name)).version)
            reward = await self._batched(spec)
        except (RewardError, RequestError) as exc:
            return RewardReport(spec, None, error=exc.message)
        return RewardReport(spec, reward.version, reward.state)

    async def add(self, spec: RewardSpec) -> str:
        """Register a reward, or replace the one of the same name; it is built first, so that a bad one is refused.

        Returns:
            Its version.

        Raises:
            InvalidRequestError: It cannot be built; nothing has changed.
            ConflictError: A composite has it for a part, and it is to become one.
            StorageError: It could not be stored; nothing has changed.
        """
        async with self._building[spec.name]:
            if spec.kind == "composite":
                version = await self._check_composite(spec)
                await self._specs.put(spec)
                self._built.pop(spec.name, None)
                return version
            try:
                built = await self._build(spec)
            except RewardError as exc:
                raise InvalidRequestError(f"the reward cannot be used: {exc.message}", param="target") from exc
            await self._specs.put(spec)
            self._built[spec.name] = (spec, built)
            return built.version

    async def remove(self, name: str) -> None:
        """Take a registered reward away.

        Raises:
            NotFoundError: Nothing of that name is registered or installed.
            ConflictError: A route or a composite names it, or it comes with an installed package.
            StorageError: Nothing has changed.
        """
        specs = await self._all()
        _named(specs, name)
        if users := _composites_with(specs, name):
            raise ConflictError(f"the reward {name!r} is a part of {', '.join(users)}; remove them first", param="name")
        if not await self._specs.delete(name):
            raise ConflictError(
                f"the reward {name!r} comes with an installed package and cannot be removed here", param="name"
            )
        self._built.pop(name, None)

    async def aclose(self) -> None:
        """Close connections to servers that score."""
        await self._kinds.aclose()

    async def _batched(self, spec: RewardSpec) -> BatchedReward:
        if spec.kind == "composite":
            raise InvalidRequestError(
                f"the reward {spec.name!r} is a composite: it compares outputs of one prompt by their places among "
                "reference rollouts, and has no score for an output alone. Score its parts",
                param="reward",
            )
        if (ready := self._ready(spec)) is not None:
            return ready
        async with self._building[spec.name]:
            if (ready := self._ready(spec)) is not None:
                return ready
            try:
                built = await self._build(spec)
            except (InvalidRequestError, RewardError) as exc:
                # The reason may name paths or addresses, and whoever asked cannot mend it.
                logger.error("the reward %r cannot be loaded: %s", spec.name, exc.message)
                may_pass = isinstance(exc, RewardUnavailableError)
                self._failed[spec.name] = (spec, may_pass, time.monotonic())
                raise _cannot_load(spec.name, may_pass=may_pass) from exc
            self._built[spec.name] = (spec, built)
            return built

    def _ready(self, spec: RewardSpec) -> BatchedReward | None:
        known_spec, built = self._built.get(spec.name, (None, None))
        if known_spec == spec:
            return built
        failed_spec, may_pass, failed_at = self._failed.get(spec.name, (None, False, 0.0))
        if failed_spec == spec and time.monotonic() - failed_at < _FAILURE_KEPT_S:
            raise _cannot_load(spec.name, may_pass=may_pass)
        return None

    async def _build(self, spec: RewardSpec) -> BatchedReward:
        model, limits = await self._kinds.build(spec)
        return BatchedReward(model, limits, self._observer)

    async def _check_composite(self, spec: RewardSpec) -> str:
        specs = await self._all()
        if users := _composites_with(specs, spec.name):
            raise ConflictError(
                f"the reward {spec.name!r} is a part of {', '.join(users)}, and composites cannot be nested",
                param="kind",
            )
        mix = parse_mix(spec)
        parts = [_part(specs, part) for part in mix.weights if part != spec.name]
        if len(parts) < len(mix.weights):
            raise InvalidRequestError("a composite cannot be a part of itself", param="options.weights")
        return combine_parts(spec.name, mix, [await self._batched(part) for part in parts]).version

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


def _cannot_load(name: str, *, may_pass: bool) -> RewardError:
    message = f"the reward {name!r} is registered but cannot be loaded; the gateway's log has the reason"
    if may_pass:
        return RewardUnavailableError(message, retry_after_s=_FAILURE_KEPT_S, is_retriable=False)
    return RewardError(message)


def _named(specs: Mapping[str, RewardSpec], name: str) -> RewardSpec:
    if name not in specs:
        known = ", ".join(sorted(specs)) or "none"
        raise NotFoundError(
            f"the reward {name!r} does not exist; known rewards: {known}", param="reward", code="reward_not_found"
        )
    return specs[name]


def _part(specs: Mapping[str, RewardSpec], name: str) -> RewardSpec:
    spec = _named(specs, name)
    if spec.kind == "composite":
        raise InvalidRequestError(
            f"the reward {name!r} is a composite, and composites cannot be nested; name its parts", param="reward"
        )
    return spec


def _composites_with(specs: Mapping[str, RewardSpec], part: str) -> builtins.list[str]:
    return sorted(name for name, spec in specs.items() if spec.kind == "composite" and part in parse_mix(spec).weights)
