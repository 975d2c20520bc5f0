"""What the gateway knows of an engine's adapter memory: who is in it, how large, in use by how many, used when.

Plain bookkeeping without waiting; `residency.Residency` acts on it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from itertools import count
from typing import Literal

from trimtab_adapters.contract.engine_api import EngineStatus
from trimtab_adapters.contract.params import VersionId

ResidencyState = Literal["resident", "loading", "on_disk"]


@dataclass(frozen=True, slots=True)
class VersionResidency:
    """Where one version is. `weight_bytes` is what it takes in the engine's memory now; `in_flight` counts requests."""

    state: ResidencyState = "on_disk"
    weight_bytes: int = 0
    in_flight: int = 0


class AdapterMemory:
    """The versions that take memory in an engine, and who may go when room is needed.

    A version takes memory while it is usable, loading, being freed, or promised to a request in flight.

    Args:
        is_kept: Whether a version must stay: a route uses it, or an admin pinned it.

    Attributes:
        budget_bytes: Of the engine; None means no bound.
        shared_bytes: What the engine uses beyond the versions' own weights.
        usable: Committed versions.
        loading: Versions on their way in.
        freeing: Versions on their way out.
        in_flight: Requests that use a version now.
        draining: Versions that take no new requests, so that somebody who waits for memory gets a turn.
    """

    def __init__(self, is_kept: Callable[[VersionId], bool]) -> None:
        self._is_kept = is_kept
        self.budget_bytes: int | None = None
        self.shared_bytes = 0
        self.usable: set[VersionId] = set()
        self.loading: set[VersionId] = set()
        self.freeing: set[VersionId] = set()
        self.in_flight: Counter[VersionId] = Counter()
        self.draining: set[VersionId] = set()
        self._sizes: dict[VersionId, int] = {}
        self._estimates: dict[VersionId, int] = {}
        self._used_at: dict[VersionId, int] = {}
        self._ticks = count(1)

    @property
    def used_bytes(self) -> int:
        """Bytes taken or promised."""
        return self.shared_bytes + self._sum(self.usable | self.loading | self.freeing | self.in_flight.keys())

    def learn(self, status: EngineStatus) -> None:
        """Take up what the engine says of budget and sizes; which versions it holds is the caller's affair."""
        self.budget_bytes = status.weights.budget_bytes
        self._sizes |= {v.version: v.weight_bytes for v in status.versions if v.weight_bytes and v.state != "loading"}
        own = sum(v.weight_bytes for v in status.versions if v.state != "failed")
        self.shared_bytes = max(0, status.weights.used_bytes - own)

    def learn_size(self, version: VersionId, num_bytes: int) -> None:
        """What a version really takes, as the engine said when it was loaded."""
        if num_bytes:
            self._sizes[version] = num_bytes

    def suppose(self, version: VersionId, num_bytes: int) -> None:
        """What a version may take, until the engine has said it."""
        self._estimates.setdefault(version, num_bytes)

    def touch(self, version: VersionId) -> None:
        """It is used now."""
        self._used_at[version] = next(self._ticks)

    def is_claimed(self, versions: Set[VersionId]) -> bool:
        """Whether all of these take memory already and none is on its way out."""
        return not versions & self.freeing and versions <= (self.usable | self.loading | self.in_flight.keys())

    def is_impossible(self, versions: Set[VersionId]) -> bool:
        """Whether these are known to be larger together than the whole budget.

        What the engine uses beyond versions is not taken off: of a LoRA that was refused together with its LM the size
        is that of both, and the LM may be in there by now.
        """
        if self.budget_bytes is None or not versions <= self._sizes.keys():
            return False
        return self._sum(versions) > self.budget_bytes

    def lacking_bytes(self, versions: Set[VersionId]) -> int:
        """How much must be freed before all of these fit; 0 or less when they do.

        Sizes may be estimates, so nobody is taken to need more than everything: the engine has the last word.
        """
        if self.budget_bytes is None:
            return 0
        claimed = self.usable | self.loading | self.in_flight.keys()
        most = self.budget_bytes - self.shared_bytes - self._sum(versions & claimed)
        needed = min(self._sum(versions - claimed), max(0, most))
        return self.used_bytes + needed - self.budget_bytes

    def victims(self, num_bytes: int, wanted: Set[VersionId]) -> list[VersionId] | None:
        """Versions to retire for so many bytes beyond those that are being freed, least recently used first.

        Those in flight, kept or wanted are none. None: there are not enough.
        """
        return self._oldest(num_bytes, (v for v in self.usable if not self.in_flight[v]), wanted)

    def drain_for(self, num_bytes: int, wanted: Set[VersionId]) -> None:
        """Choose who takes no new requests until there is room: those chosen before, then the longest unused."""
        chosen = self._oldest(num_bytes, self.usable, wanted, first=self.draining) or ()
        self.draining = {version for version in chosen if self.in_flight[version]}

    def describe(self, version: VersionId) -> VersionResidency:
        """For status reports."""
        if version in self.usable and version not in self.freeing:
            return VersionResidency("resident", self._size(version), self.in_flight[version])
        if version in self.loading:
            return VersionResidency("loading", self._size(version), self.in_flight[version])
        return VersionResidency(in_flight=self.in_flight[version])

    def _oldest(
        self,
        num_bytes: int,
        candidates: Iterable[VersionId],
        wanted: Set[VersionId],
        first: Set[VersionId] = frozenset(),
    ) -> list[VersionId] | None:
        missing = num_bytes - self._sum(self.freeing)
        chosen: list[VersionId] = []
        for version in sorted(candidates, key=lambda v: (v not in first, self._used_at.get(v, 0))):
            if missing <= 0:
                break
            if version not in wanted and version not in self.freeing and not self._is_kept(version):
                chosen.append(version)
                missing -= self._size(version)
        return chosen if missing <= 0 else None

    def _sum(self, versions: Iterable[VersionId]) -> int:
        return sum(self._size(version) for version in versions)

    def _size(self, version: VersionId) -> int:
        return self._sizes.get(version) or self._estimates.get(version, 0)
