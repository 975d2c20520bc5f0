"""Changes of routes, each made only when the engine holds what the route will point to."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.params import AdapterWeight, SteeringRequest, VersionId
from trimtab_server.canary.decision import CanaryRule
from trimtab_server.storage.base import NO_OPTIONS, Canary, RouteRevision
from trimtab_server.storage.canaries import SqlCanaries
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

    async def promote(
        self,
        route: str,
        adapter: str,
        *,
        version: VersionId | None,
        alpha: float | None,
        percent: float,
        rule: CanaryRule,
        is_forced: bool,
        comment: str,
    ) -> RouteRevision:
        """Let a share of a route's requests try an adapter version, which is promoted when it proves no worse.

        Raises what `SqlCatalog.plan_activation`, `SqlCanaries.start_canary` and `before_switch` raise, and:

        Raises:
            NotFoundError: There is no such route.
            ConflictError: The version has not passed the gate of its training, and it is not forced.
        """
        current = self._catalog.state.route(route)
        chosen = self._catalog.state.choose(adapter, version)
        if not is_forced:
            check_gate(chosen.version, chosen.manifest.evaluation)
        terms = self._catalog.plan_activation(route, adapter, chosen.version, alpha)
        await self._load(terms)
        canary = Canary(chosen.version, terms, percent, rule.num_answers, rule.min_answers, rule.timeout_s)
        return await SqlCanaries(self._catalog).start_canary(
            route, canary, comment=comment, expected_revision=current.revision
        )

    async def rollback(self, route: str, *, revision: int | None) -> RouteRevision:
        """Return a route to an earlier revision. Raises what `SqlCatalog.rollback` and `before_switch` raise."""
        earlier = await self._catalog.earlier_revision(route, revision)
        await self._load(earlier.steering)
        return await self._catalog.rollback(route, earlier.revision)

    async def _load(self, steering: Sequence[AdapterWeight]) -> None:
        for weight in steering:
            await self._before_switch(weight.version)


def check_gate(version: VersionId, evaluation: Mapping[str, Any]) -> None:
    """Raises `ConflictError` unless the manifest says that a version has passed the gate of its training."""
    gate = evaluation.get("gate")
    if isinstance(gate, Mapping) and gate.get("passed") is True:
        return
    reasons = gate.get("reasons") if isinstance(gate, Mapping) else None
    why = "; ".join(map(str, reasons)) if isinstance(reasons, list) and reasons else "it was never evaluated"
    raise ConflictError(
        f"the version `{version}` has not passed the gate: {why}. To let it take traffic all the same, say `force`",
        code="gate_not_passed",
    )
