"""`/admin/adapters`: register, list, pin and retire adapter versions."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from trimtab_adapters.contract.errors import EngineError, InvalidRequestError, PermissionDeniedError
from trimtab_adapters.contract.params import AdapterName, Alpha, VersionId
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.api.admin.switching import BeforeSwitch, RouteSwitcher
from trimtab_server.engine.adapter_memory import VersionResidency
from trimtab_server.storage.base import AdapterVersion
from trimtab_server.storage.catalog import SqlCatalog, Validate

logger = logging.getLogger(__name__)

AfterRetire = Callable[[VersionId], Awaitable[object]]
"""Frees a retired version in the engine when its last request ends, for example `Residency.retire`."""
ResidencyOf = Callable[[VersionId], VersionResidency]
"""Where a version is now, for example `Residency.describe`."""
BaseVocabulary = Callable[[], Awaitable[tuple[str, int] | None]]
"""Fingerprint and number of tokens of the base model's tokenizer; None when no engine can tell now."""


class AddAdapter(Body):
    """Body of `POST /admin/adapters`."""

    name: AdapterName
    path: str = Field(min_length=1, max_length=4096)
    """Absolute path of a directory that the gateway can read."""
    trunk: str | None = Field(default=None, min_length=1, max_length=4096)
    """The same of the LM that `path` is a LoRA on."""
    prefix_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(default=None, max_length=4096)
    default_alpha: Alpha | None = None
    route: AdapterName | None = None
    """Also activate the version on this route."""
    alpha: Alpha | None = None
    """Its weight on that route."""


def build_adapters_router(
    catalog: SqlCatalog,
    switcher: RouteSwitcher,
    *,
    validate: Validate,
    before_pin: BeforeSwitch,
    after_retire: AfterRetire,
    residency_of: ResidencyOf,
    base_vocabulary: BaseVocabulary,
    adapter_roots: Sequence[Path] | None,
) -> APIRouter:
    """Routes for adapter versions.

    Args:
        catalog: Where versions are registered.
        switcher: Activates a version that is registered together with a route.
        validate: Loads a version in the engine before it is accepted.
        before_pin: Loads a version in the engine.
        after_retire: See `AfterRetire`.
        residency_of: See `ResidencyOf`.
        base_vocabulary: See `BaseVocabulary`.
        adapter_roots: Directories that versions may be registered from; None means any.
    """
    router = APIRouter(prefix="/admin/adapters")

    def answer(version: AdapterVersion) -> dict[str, Any]:
        return version_object(version, catalog.state.users_of(version.version), residency_of(version.version))

    @router.post("")
    async def add(body: Annotated[AddAdapter, Depends(body_of(AddAdapter))]) -> JsonAnswer:
        if body.alpha is not None and body.route is None:
            raise InvalidRequestError(
                "`alpha` is the weight on `route`, which is missing; `default_alpha` is the version's own",
                param="alpha",
            )
        if body.route is not None:
            catalog.check_route_name(body.route)
        version = await catalog.register(
            _allowed_path(body.path, adapter_roots, "path"),
            name=body.name,
            trunk=None if body.trunk is None else _allowed_path(body.trunk, adapter_roots, "trunk"),
            prefix_token_ids=body.prefix_token_ids,
            default_alpha=body.default_alpha,
            expected_vocabulary=await base_vocabulary(),
            validate=validate,
        )
        logger.info("registered version %s of the adapter %s", version.version, version.name)
        if body.route is not None:
            await switcher.activate(body.route, body.name, version=version.version, alpha=body.alpha)
        return JsonAnswer(answer(version))

    @router.get("")
    async def list_all() -> JsonAnswer:
        return list_answer(answer(version) for version in await catalog.versions())

    @router.get("/{name}")
    async def list_one(name: str) -> JsonAnswer:
        return list_answer(answer(version) for version in await catalog.versions(name))

    @router.get("/{name}/versions/{version}")
    async def show(name: str, version: str) -> JsonAnswer:
        return JsonAnswer(answer(catalog.state.version_of(name, version)))

    @router.post("/{name}/versions/{version}/retire")
    async def retire(name: str, version: str) -> JsonAnswer:
        retired = await catalog.retire_version(name, version)
        logger.info("retired version %s of the adapter %s", version, name)
        try:
            await after_retire(retired.version)
        except EngineError as exc:  # an engine that is away holds nothing, and does not load it when it returns
            logger.warning("the engine could not free version %s: %s", version, exc.message)
        return JsonAnswer(answer(retired))

    _add_pins(router, catalog, before_pin, answer)
    return router


def _add_pins(
    router: APIRouter,
    catalog: SqlCatalog,
    before_pin: BeforeSwitch,
    answer: Callable[[AdapterVersion], dict[str, Any]],
) -> None:
    @router.put("/{name}/versions/{version}/pin")
    async def pin(name: str, version: str) -> JsonAnswer:
        catalog.state.choose(name, version)
        await before_pin(version)
        return JsonAnswer(answer(await catalog.pin_version(name, version)))

    @router.delete("/{name}/versions/{version}/pin")
    async def unpin(name: str, version: str) -> Response:
        await catalog.unpin_version(name, version)
        return Response(status_code=204)


def version_object(version: AdapterVersion, routes: Sequence[str], residency: VersionResidency) -> dict[str, Any]:
    """An adapter version as the admin API shows it; `routes` are those that use it now."""
    return {
        "object": "adapter.version",
        "name": version.name,
        "version": version.version,
        "path": version.path,
        "manifest": version.manifest,
        "created_at": version.created_at,
        "retired_at": version.retired_at,
        "pinned_at": version.pinned_at,
        "residency": residency,
        "routes": list(routes),
    }


def _allowed_path(text: str, roots: Sequence[Path] | None, param: str) -> Path:
    path = Path(text)
    if "\x00" in text or not path.is_absolute():
        raise InvalidRequestError(f"`{param}` must be an absolute path on the gateway's machine", param=param)
    resolved = path.resolve()
    if roots is not None and not any(resolved.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(str(root) for root in roots) or "none"
        raise PermissionDeniedError(
            f"adapters may only be registered from the configured adapter roots ({allowed})", param=param
        )
    return resolved
