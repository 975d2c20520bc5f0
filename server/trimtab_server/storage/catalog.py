"""Adapters and routes: the database is the truth, requests are answered from memory."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import anyio.to_thread
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, func, select, update

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError
from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.contract.params import AdapterName, AdapterWeight, SteeringOptions, SteeringRequest
from trimtab_adapters.store import VersionStore
from trimtab_server.canary.split import takes_canary
from trimtab_server.storage.base import NO_OPTIONS, AdapterVersion, CanaryArm, ResolvedModel, RouteRevision
from trimtab_server.storage.catalog_state import CatalogState, dump_canary, dump_options, dump_steering, revision_of
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import adapter_versions, route_revisions, routes

Validate = Callable[[AdapterVersion], Awaitable[None]]
"""Prepares a version in an engine before it is accepted. Raises `AdapterError` or `EngineError`."""

_LOCK = 0x636174616C6F67  # "catalog"
_ROUTE_NAME: TypeAdapter[str] = TypeAdapter(AdapterName)


class SqlCatalog:
    """The catalog. Call `load` before anything else.

    Each write happens in one transaction that looks at the database again and that no other write overlaps, so several
    gateways may share one; each sees what others have changed at its own next write or `load`.

    Args:
        database: Migrated.
        store: Where version directories are kept.
        base_model: Public name of the base model.
        clock: Unix seconds.
    """

    def __init__(
        self, database: Database, store: VersionStore, base_model: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.base_model = base_model
        self._database = database
        self._store = store
        self._clock = clock
        self._state = CatalogState.empty()
        self._registering = asyncio.Lock()
        self._changing = asyncio.Lock()

    async def load(self) -> None:
        """Read the current state from the database."""
        self._state = await self._database.read(CatalogState.load)

    @property
    def state(self) -> CatalogState:
        """All versions and routes as last read."""
        return self._state

    async def resolve(
        self, model: str, steering: SteeringRequest | None, request_id: str | None = None
    ) -> ResolvedModel:
        """Pin a request's `model` and `steering` to exact versions.

        Args:
            model: The base model's name or a route's.
            steering: Its adapters, where given, replace the route's; so does each option that is given, also as None.
            request_id: Decides whether the request tries the route's canary; without one, or with adapters of its own,
                it does not.

        Raises:
            NotFoundError: An unknown model, adapter or version.
            InvalidRequestError: A retired version, too many adapters, the same version twice, or a guidance scale
                without a negative prompt.
        """
        state = self._state
        revision = None if model == self.base_model else state.routes.get(model)
        if revision is None and model != self.base_model:
            raise NotFoundError(f"The model `{model}` does not exist", param="model", code="model_not_found")
        terms = revision.steering if revision is not None else ()
        arm = None
        if steering is not None and steering.adapters is not None:
            terms = state.resolve(steering)
        elif revision is not None and revision.canary is not None and request_id is not None:
            canary = revision.canary
            is_canary = takes_canary(model, revision.revision, request_id, canary.percent)
            arm = CanaryArm(revision.revision, canary.version, canary.percent, is_canary)
            terms = canary.steering if is_canary else terms
        return ResolvedModel(
            model=model,
            base_model=self.base_model,
            steering=terms,
            best_of=revision.best_of if revision is not None else None,
            reward=revision.reward if revision is not None else None,
            options=(revision.options if revision is not None else NO_OPTIONS).overridden_by(steering),
            canary=arm,
        )

    async def version(self, version: str) -> AdapterVersion:
        """Raises `NotFoundError`."""
        return self._state.version(version)

    async def versions(self, name: str | None = None) -> Sequence[AdapterVersion]:
        """All versions, or those of one adapter; oldest first. Raises `NotFoundError` for an unknown adapter."""
        return list(self._state.versions.values()) if name is None else self._state.versions_of(name)

    async def routes(self) -> Sequence[RouteRevision]:
        """The current revision of each route, by name."""
        return list(self._state.routes.values())

    async def active_versions(self) -> Sequence[AdapterVersion]:
        """Versions that some route uses now, and those that are pinned."""
        state = self._state
        wanted = {weight.version: None for revision in state.routes.values() for weight in revision.weights}
        wanted |= {version.version: None for version in state.versions.values() if version.pinned_at is not None}
        return [state.version(version) for version in wanted]

    def is_kept(self, version: str) -> bool:
        """Whether a route uses a version now, or it is pinned."""
        return self._state.is_kept(version)

    async def register(
        self,
        source: Path,
        *,
        name: str,
        trunk: Path | None = None,
        prefix_token_ids: Sequence[int] | None = None,
        default_alpha: float | None = None,
        expected_vocabulary: tuple[str, int] | None = None,
        validate: Validate | None = None,
    ) -> AdapterVersion:
        """Copy a directory into the store, have it validated, and add it. The same content is the same version again.

        With a `trunk` the directory is a LoRA as PEFT saves it, and the trunk that of the LM that it was trained on.

        Raises:
            AdapterError: It is refused; nothing has changed.
            EngineError: It could not be validated now; nothing has changed.
            StorageError: It could not be stored.
        """

        def copy() -> tuple[Manifest, Path]:
            return self._store.add(
                source,
                name=name,
                trunk=trunk,
                prefix_token_ids=prefix_token_ids,
                default_alpha=default_alpha,
                expected_vocabulary=expected_vocabulary,
            )

        async with self._registering:
            manifest, path = await anyio.to_thread.run_sync(copy)
            known = self._state.versions.get(manifest.version_id)
            if known is not None and known.retired_at is None:
                return known
            version = AdapterVersion(name, manifest.version_id, str(path), manifest, self._clock())
            try:
                if validate is not None:
                    await validate(version)
                return await self.add_version(version)
            except BaseException:
                if known is None:
                    await anyio.to_thread.run_sync(self._store.remove, version.version)
                raise

    async def add_version(self, version: AdapterVersion) -> AdapterVersion:
        """Add a version whose directory is in the store. One that is there is kept, and is no longer retired."""
        row = {
            "version": version.version,
            "name": version.name,
            "path": version.path,
            "manifest": version.manifest.model_dump(mode="json"),
            "created_at": version.created_at,
            "retired_at": None,
        }
        insert = self._database.insert(adapter_versions).values(row)
        statement = insert.on_conflict_do_update(
            index_elements=["version"], set_={"retired_at": None, "path": insert.excluded.path}
        )

        def work(connection: Connection, _: CatalogState) -> None:
            connection.execute(statement)

        await self._change(work)
        return self._state.version(version.version)

    async def retire_version(self, name: str, version: str) -> AdapterVersion:
        """Refuse new requests for a version. Retiring it twice is harmless.

        Raises:
            NotFoundError: It does not exist.
            ConflictError: A route uses it.
        """
        statement = update(adapter_versions).where(
            (adapter_versions.c.version == version) & adapter_versions.c.retired_at.is_(None)
        )

        def work(connection: Connection, state: CatalogState) -> None:
            state.version_of(name, version)
            if users := state.users_of(version):
                raise ConflictError(
                    f"The version `{version}` is in use by the routes {', '.join(users)}; switch or delete them first"
                )
            connection.execute(statement.values(retired_at=self._clock(), pinned_at=None))

        await self._change(work)
        return self._state.version(version)

    async def pin_version(self, name: str, version: str) -> AdapterVersion:
        """Keep a version in the engine's memory. Pinning it twice is harmless.

        Raises:
            NotFoundError: It does not exist.
            InvalidRequestError: It is retired.
        """
        return await self._set_pinned(name, version, self._clock())

    async def unpin_version(self, name: str, version: str) -> AdapterVersion:
        """Let the engine give a version's memory to others when no route uses it. Raises `NotFoundError`."""
        return await self._set_pinned(name, version, None)

    async def _set_pinned(self, name: str, version: str, pinned_at: float | None) -> AdapterVersion:
        statement = update(adapter_versions).where(adapter_versions.c.version == version)

        def work(connection: Connection, state: CatalogState) -> None:
            found = state.version_of(name, version)
            if pinned_at is not None:
                state.choose(name, version)
            if (found.pinned_at is None) != (pinned_at is None):
                connection.execute(statement.values(pinned_at=pinned_at))

        await self._change(work)
        return self._state.version(version)

    async def put_route(
        self,
        route: str,
        steering: Sequence[AdapterWeight],
        *,
        best_of: int | None = None,
        reward: str | None = None,
        comment: str = "",
        options: SteeringOptions = NO_OPTIONS,
    ) -> RouteRevision:
        """Make a route, or give it a new revision.

        Args:
            route: Its public model name.
            steering: Exact versions, as `state.resolve` gives them.
            best_of: Candidates per prompt where a request says nothing.
            reward: Name of the reward that ranks them.
            comment: Kept in the history.
            options: What the steering has beside its adapters.

        Raises:
            InvalidRequestError: A bad name, or a version that is retired.
            NotFoundError: An unknown version.
            ConflictError: The name is the base model's.
        """
        self.check_route_name(route)
        draft = RouteRevision(route, 0, tuple(steering), best_of, reward, comment=comment, options=options)
        return await self.write_revision(route, lambda connection, state: draft)

    def plan_activation(
        self, route: str, adapter: str, version: str | None = None, alpha: float | None = None
    ) -> tuple[AdapterWeight, ...]:
        """The steering that a route would have with this adapter activated.

        A route that steers by this adapter already, perhaps among others, gets the new version and weight in its
        place; any other route is steered by this adapter alone.

        Args:
            route: Need not exist yet.
            adapter: Name of the adapter.
            version: None means the newest one that is not retired.
            alpha: None means the version's default.

        Raises:
            NotFoundError: An unknown adapter or version.
            InvalidRequestError: A retired version, or a steering that becomes invalid.
            ConflictError: The route steers by several versions of this adapter.
        """
        chosen = self._state.choose(adapter, version)
        weight = AdapterWeight(
            name=adapter, version=chosen.version, alpha=chosen.manifest.default_alpha if alpha is None else alpha
        )
        current = self._state.routes.get(route)
        places = [i for i, w in enumerate(current.steering) if w.name == adapter] if current is not None else []
        if current is None or not places:
            return (weight,)
        if len(places) > 1:
            raise ConflictError(
                f"the route `{route}` steers by several versions of `{adapter}`; set its whole steering instead"
            )
        return (*current.steering[: places[0]], weight, *current.steering[places[0] + 1 :])

    async def activate(
        self, route: str, adapter: str, version: str | None = None, alpha: float | None = None, comment: str = ""
    ) -> RouteRevision:
        """Put an adapter version on a route, as `plan_activation` describes; all else stays."""
        steering = self.plan_activation(route, adapter, version, alpha)
        return await self.switch(route, steering, comment=comment)

    async def switch(
        self,
        route: str,
        steering: Sequence[AdapterWeight],
        *,
        comment: str = "",
        expected_revision: int | None = None,
    ) -> RouteRevision:
        """Give a route other adapters; all else but a canary stays. The route is made when there is none.

        Args:
            route: Its public model name.
            steering: Exact versions.
            comment: Kept in the history.
            expected_revision: The current revision that the caller has seen, 0 for none.

        Raises:
            ConflictError: The current revision is another.
            InvalidRequestError: A bad name, or a version that is retired.
            NotFoundError: An unknown version.
        """
        self.check_route_name(route)

        def draft(_: Connection, state: CatalogState) -> RouteRevision:
            current = state.routes.get(route, RouteRevision(route, 0, ()))
            if expected_revision not in (None, current.revision):
                raise ConflictError(f"the route `{route}` was changed at the same time; look at it and try again")
            return replace(current, steering=tuple(steering), comment=comment, canary=None)

        return await self.write_revision(route, draft)

    async def earlier_revision(self, route: str, revision: int | None = None) -> RouteRevision:
        """The revision that a rollback would return to: the one named, or the one before the current.

        Raises:
            NotFoundError: There is no such route or revision.
            ConflictError: There is no earlier revision, or the one named is not earlier.
        """
        return await self._database.read(
            lambda connection: _earlier(connection, CatalogState.load(connection).route(route), revision)
        )

    async def rollback(self, route: str, revision: int | None = None) -> RouteRevision:
        """Make a new revision that equals an earlier one but for its canary: the one named, or the one before.

        Raises:
            NotFoundError: There is no such route or revision.
            ConflictError: There is no earlier revision, the one named is not earlier, or its version is retired.
        """

        def draft(connection: Connection, state: CatalogState) -> RouteRevision:
            earlier = _earlier(connection, state.route(route), revision)
            return replace(earlier, comment=f"rollback to revision {earlier.revision}", canary=None)

        try:
            return await self.write_revision(route, draft)
        except InvalidRequestError as exc:
            raise ConflictError(f"the route `{route}` cannot be rolled back: {exc.message}", code=exc.code) from exc

    async def delete_route(self, route: str) -> None:
        """Remove a route. Its history stays, and goes on when the route is made again. Raises `NotFoundError`."""

        def work(connection: Connection, state: CatalogState) -> None:
            state.route(route)
            connection.execute(routes.delete().where(routes.c.name == route))

        await self._change(work)

    async def history(self, route: str) -> Sequence[RouteRevision]:
        """All revisions that a route ever had, oldest first. Raises `NotFoundError`."""
        statement = select(route_revisions).where(route_revisions.c.route == route).order_by(route_revisions.c.revision)

        def fetch(connection: Connection) -> list[RouteRevision]:
            return [revision_of(row) for row in connection.execute(statement).mappings()]

        found = await self._database.read(fetch) if "\x00" not in route else []
        if not found:
            raise NotFoundError(f"The route `{route}` does not exist", param="route", code="route_not_found")
        return found

    def check_route_name(self, route: str) -> None:
        """Raises `InvalidRequestError` for a bad name, `ConflictError` for the base model's."""
        if route == self.base_model:
            raise ConflictError(f"`{route}` is the base model's name; give the route another", param="route")
        try:
            _ROUTE_NAME.validate_python(route)
        except ValidationError as exc:
            raise InvalidRequestError(
                f"{route!r} is not a route name: 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or "
                "digit",
                param="route",
            ) from exc

    async def write_revision(
        self, route: str, draft: Callable[[Connection, CatalogState], RouteRevision]
    ) -> RouteRevision:
        """Add a revision of a route and make it the current one; its number and time are given here.

        Args:
            route: Its name.
            draft: Makes the revision from the state that the write sees; what it raises ends the write.

        Raises:
            InvalidRequestError: A version that is retired.
            NotFoundError: An unknown version.
        """
        last = select(func.max(route_revisions.c.revision)).where(route_revisions.c.route == route)

        def work(connection: Connection, state: CatalogState) -> None:
            revision = draft(connection, state)
            for weight in revision.weights:
                state.choose(weight.name, weight.version)
            number = (connection.execute(last).scalar_one() or 0) + 1
            row = {
                "route": route,
                "revision": number,
                "steering": dump_steering(revision.steering),
                "best_of": revision.best_of,
                "reward": revision.reward,
                "created_at": self._clock(),
                "comment": revision.comment,
                "options": dump_options(revision.options),
                "canary": dump_canary(revision.canary),
            }
            connection.execute(route_revisions.insert().values(row))
            pointer = self._database.insert(routes).values(name=route, revision=number)
            connection.execute(pointer.on_conflict_do_update(index_elements=["name"], set_={"revision": number}))

        await self._change(work)
        return self._state.route(route)

    async def _change(self, work: Callable[[Connection, CatalogState], None]) -> None:
        """Run a write that sees the database's current state, and take up the state that it leaves.

        A caller that goes away does not stop it, or memory would miss what the database has.
        """

        def transaction(connection: Connection) -> CatalogState:
            self._database.lock(connection, _LOCK)
            work(connection, CatalogState.load(connection))
            return CatalogState.load(connection)

        async def change() -> None:
            async with self._changing:
                self._state = await self._database.write(transaction)

        await asyncio.shield(asyncio.create_task(change()))


def _earlier(connection: Connection, current: RouteRevision, revision: int | None) -> RouteRevision:
    wanted = current.revision - 1 if revision is None else revision
    if revision is None and wanted < 1:
        raise ConflictError(f"the route `{current.route}` has no earlier revision")
    if wanted >= current.revision:
        raise ConflictError(f"revision {wanted} is not earlier than the current one, {current.revision}")
    statement = select(route_revisions).where(
        (route_revisions.c.route == current.route) & (route_revisions.c.revision == wanted)
    )
    row = connection.execute(statement).mappings().one_or_none()
    if row is None:
        raise NotFoundError(
            f"The route `{current.route}` has no revision {wanted}", param="revision", code="revision_not_found"
        )
    return revision_of(row)
