"""What the catalog holds in memory: all adapter versions and the current revision of each route, as one value."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Self

from sqlalchemy import Connection, RowMapping, select

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError
from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.contract.params import (
    MAX_ADAPTERS,
    AdapterChoice,
    AdapterWeight,
    SteeringOptions,
    SteeringRequest,
)
from trimtab_server.storage.base import AdapterVersion, Canary, RouteRevision
from trimtab_server.storage.tables import adapter_versions, route_revisions, routes


@dataclass(frozen=True, slots=True)
class CatalogState:
    """Immutable; a write replaces it by a new one.

    Attributes:
        versions: By version id, oldest first.
        routes: The current revision of each route, by name.
        on_routes: Ids of the versions that these use.
    """

    versions: Mapping[str, AdapterVersion]
    routes: Mapping[str, RouteRevision]
    on_routes: frozenset[str] = frozenset()

    @classmethod
    def empty(cls) -> Self:
        """Before anything was loaded."""
        return cls(MappingProxyType({}), MappingProxyType({}))

    @classmethod
    def load(cls, connection: Connection) -> Self:
        """Read it from the database."""
        order = (adapter_versions.c.created_at, adapter_versions.c.version)
        versions = [_version(row) for row in connection.execute(select(adapter_versions).order_by(*order)).mappings()]
        current = select(route_revisions).join(
            routes, (routes.c.name == route_revisions.c.route) & (routes.c.revision == route_revisions.c.revision)
        )
        revisions = [revision_of(row) for row in connection.execute(current.order_by(routes.c.name)).mappings()]
        return cls(
            MappingProxyType({version.version: version for version in versions}),
            MappingProxyType({revision.route: revision for revision in revisions}),
            frozenset(weight.version for revision in revisions for weight in revision.weights),
        )

    def route(self, name: str) -> RouteRevision:
        """Raises `NotFoundError`."""
        revision = self.routes.get(name)
        if revision is None:
            raise NotFoundError(f"The route `{name}` does not exist", param="route", code="route_not_found")
        return revision

    def version(self, version: str) -> AdapterVersion:
        """Raises `NotFoundError`."""
        found = self.versions.get(version)
        if found is None:
            raise NotFoundError(
                f"The adapter version `{version}` does not exist", param="version", code="version_not_found"
            )
        return found

    def versions_of(self, name: str) -> list[AdapterVersion]:
        """All versions of an adapter, oldest first. Raises `NotFoundError` when there is none."""
        found = [version for version in self.versions.values() if version.name == name]
        if not found:
            raise NotFoundError(f"The adapter `{name}` does not exist", param="adapter", code="adapter_not_found")
        return found

    def version_of(self, name: str, version: str) -> AdapterVersion:
        """One version of an adapter. Raises `NotFoundError`."""
        for found in self.versions_of(name):
            if found.version == version:
                return found
        raise NotFoundError(
            f"The adapter `{name}` has no version `{version}`", param="version", code="version_not_found"
        )

    def users_of(self, version: str) -> list[str]:
        """Names of the routes whose current revision uses a version."""
        return [r.route for r in self.routes.values() if any(w.version == version for w in r.weights)]

    def is_kept(self, version: str) -> bool:
        """Whether a version stays in the engine's memory: a route uses it, or it is pinned."""
        found = self.versions.get(version)
        return found is not None and (found.pinned_at is not None or version in self.on_routes)

    def resolve(self, steering: SteeringRequest) -> tuple[AdapterWeight, ...]:
        """Pin a steering to exact versions and weights.

        Raises:
            NotFoundError: An unknown adapter or version.
            InvalidRequestError: A retired version, too many adapters, or the same version twice.
        """
        choices = steering.adapters or []
        if len(choices) > MAX_ADAPTERS:
            raise InvalidRequestError(
                f"a steering may have at most {MAX_ADAPTERS} adapters, not {len(choices)}", param="steering"
            )
        try:
            terms = tuple(self._term(choice) for choice in choices)
        except NotFoundError as exc:
            raise NotFoundError(exc.message, param="steering", code=exc.code) from exc
        if len({term.version for term in terms}) != len(terms):
            raise InvalidRequestError(
                "the same adapter version appears twice in the steering; name it once, with the sum of the alphas",
                param="steering",
            )
        return terms

    def _term(self, choice: AdapterChoice) -> AdapterWeight:
        version = self.choose(choice.name, choice.version)
        alpha = version.manifest.default_alpha if choice.alpha is None else choice.alpha
        return AdapterWeight(name=choice.name, version=version.version, alpha=alpha)

    def choose(self, name: str, version: str | None) -> AdapterVersion:
        """The version that is named, or the adapter's newest one that is not retired.

        Raises:
            NotFoundError: It does not exist.
            InvalidRequestError: It is retired.
        """
        if version is not None:
            found = self.version_of(name, version)
            if found.retired_at is not None:
                raise InvalidRequestError(
                    f"The version `{version}` of the adapter `{name}` is retired; register it again to use it",
                    param="steering",
                    code="version_retired",
                )
            return found
        usable = [v for v in self.versions_of(name) if v.retired_at is None]
        if not usable:
            raise InvalidRequestError(
                f"All versions of the adapter `{name}` are retired; register one to use it",
                param="steering",
                code="version_retired",
            )
        return usable[-1]


def revision_of(row: RowMapping) -> RouteRevision:
    """A row of `route_revisions` as a value."""
    steering = tuple(AdapterWeight.model_validate(weight) for weight in row["steering"])
    options = SteeringOptions.model_validate(row["options"] or {})
    canary = None if row["canary"] is None else _canary(row["canary"])
    return RouteRevision(**{**row, "steering": steering, "options": options, "canary": canary})


def dump_steering(steering: Iterable[AdapterWeight]) -> list[dict[str, object]]:
    """The JSON form of a steering in `route_revisions`."""
    return [weight.model_dump() for weight in steering]


def dump_options(options: SteeringOptions) -> dict[str, object] | None:
    """The JSON form of a steering's options in `route_revisions`; None, as in old revisions, where there are none."""
    return options.model_dump(exclude_none=True) or None


def dump_canary(canary: Canary | None) -> dict[str, object] | None:
    """The JSON form of a canary in `route_revisions`."""
    return None if canary is None else {**asdict(canary), "steering": dump_steering(canary.steering)}


def _canary(data: Mapping[str, Any]) -> Canary:
    return Canary(**{**data, "steering": tuple(AdapterWeight.model_validate(weight) for weight in data["steering"])})


def _version(row: RowMapping) -> AdapterVersion:
    return AdapterVersion(**{**row, "manifest": Manifest.model_validate(row["manifest"])})
