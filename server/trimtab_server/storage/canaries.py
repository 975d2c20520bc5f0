"""Beginning and end of canaries, as revisions of their routes."""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection

from trimtab_adapters.contract.errors import ConflictError
from trimtab_server.storage.base import Canary, RouteRevision
from trimtab_server.storage.catalog import SqlCatalog
from trimtab_server.storage.catalog_state import CatalogState


class SqlCanaries:
    """The canaries of a catalog's routes.

    Args:
        catalog: Where routes are kept.
    """

    def __init__(self, catalog: SqlCatalog) -> None:
        self._catalog = catalog

    async def routes(self) -> Sequence[RouteRevision]:
        """The current revision of each route."""
        return await self._catalog.routes()

    async def start_canary(self, route: str, canary: Canary, *, comment: str, expected_revision: int) -> RouteRevision:
        """Let a share of a route's requests try a new version.

        Args:
            route: Its name.
            canary: The version, and for how long.
            comment: Kept in the history.
            expected_revision: The current revision that the caller has seen.

        Raises:
            NotFoundError: There is no such route or version.
            InvalidRequestError: The version is retired.
            ConflictError: The route has a canary, steers by this version alone, or was changed meanwhile.
        """

        def draft(_: Connection, state: CatalogState) -> RouteRevision:
            current = state.route(route)
            if current.canary is not None:
                raise ConflictError(
                    f"the route `{route}` tries version `{current.canary.version}` already; activate it, or roll the "
                    "route back, to end that",
                    code="canary_running",
                )
            if current.revision != expected_revision:
                raise ConflictError(f"the route `{route}` was changed at the same time; look at it and try again")
            if current.steering == canary.steering:
                raise ConflictError(f"the route `{route}` uses version `{canary.version}` with this weight already")
            return replace(current, canary=canary, comment=comment)

        return await self._catalog.write_revision(route, draft)

    async def end_canary(self, route: str, revision: int, *, is_promoted: bool, comment: str) -> RouteRevision:
        """Make the canary's steering the route's, or drop it.

        Raises:
            NotFoundError: The route is gone.
            ConflictError: The current revision is another, or has no canary.
        """

        def draft(_: Connection, state: CatalogState) -> RouteRevision:
            current = state.route(route)
            if current.revision != revision or current.canary is None:
                raise ConflictError(f"the canary of the route `{route}` has ended already")
            steering = current.canary.steering if is_promoted else current.steering
            return replace(current, steering=steering, canary=None, comment=comment)

        return await self._catalog.write_revision(route, draft)
