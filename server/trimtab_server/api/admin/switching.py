"""Changes of routes, each made only when the engine holds what the route will point to."""

from collections.abc import Awaitable, Callable, Sequence

from trimtab_adapters.contract.params import AdapterWeight, SteeringRequest, VersionId
from trimtab_server.storage.base import NO_OPTIONS, RouteRevision
from trimtab_server.storage.catalog import SqlCatalog

BeforeSwitch = Callable[[VersionId], Awaitable[object]]
"""Loads a version in the engine (prepare and commit). Raises `AdapterError` or `EngineError`."""


class RouteSwitcher:
    """Writes route revisions after `before_switch` has loaded their versions.

    Args:
        catalog: Where routes are kept.
        before_switch: For example `Residency.ensure`.
    """

    def __init__(self, catalog: SqlCatalog, before_switch: BeforeSwitch) -> None:
        self._catalog = catalog
        self._before_switch = before_switch

    async def put(
        self, route: str, steering: SteeringRequest, *, best_of: int | None, reward: str | None, comment: str
    ) -> RouteRevision:
        """Make a route, or give it a new revision. Raises what `SqlCatalog.put_route` and `before_switch` raise."""
        self._catalog.check_route_name(route)
        terms, options = self._catalog.state.resolve(steering), NO_OPTIONS.overridden_by(steering)
        await self._load(terms)
        return await self._catalog.put_route(
            route, terms, best_of=best_of, reward=reward, comment=comment, options=options
        )

    async def activate(
        self, route: str, adapter: str, *, version: VersionId | None, alpha: float | None, comment: str = ""
    ) -> RouteRevision:
        """Put an adapter version on a route. Raises what `SqlCatalog.switch` and `before_switch` raise."""
        self._catalog.check_route_name(route)
        current = self._catalog.state.routes.get(route)
        terms = self._catalog.plan_activation(route, adapter, version, alpha)
        await self._load(terms)
        return await self._catalog.switch(
            route, terms, comment=comment, expected_revision=current.revision if current is not None else 0
        )

    async def rollback(self, route: str, *, revision: int | None) -> RouteRevision:
        """Return a route to an earlier revision. Raises what `SqlCatalog.rollback` and `before_switch` raise."""
        earlier = await self._catalog.earlier_revision(route, revision)
        await self._load(earlier.steering)
        return await self._catalog.rollback(route, earlier.revision)

    async def _load(self, steering: Sequence[AdapterWeight]) -> None:
        for weight in steering:
            await self._before_switch(weight.version)
