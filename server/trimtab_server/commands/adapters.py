"""`trimtab adapters`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, RouteName, Url
from trimtab_server.commands.output import print_json, print_line, print_rows
from trimtab_server.commands.routes import report_revision

_COLUMNS = {
    "name": "NAME",
    "version": "VERSION",
    "default_alpha": "ALPHA",
    "created_at": "CREATED (UTC)",
    "state": "STATE",
    "routes": "ROUTES",
    "memory": "IN MEMORY",
}


def add(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    directory: Annotated[Path, typer.Argument(help="Directory of a causal LM, or of a LoRA; the gateway reads it.")],
    trunk: Annotated[Path | None, typer.Option(help="Directory of the LM that the LoRA was trained on.")] = None,
    prefix_token_ids: Annotated[
        str | None, typer.Option(help="Token ids that the adapter sees first, with commas between.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight where a request names none.")] = None,
    route: Annotated[str | None, typer.Option(help="Also activate it on this route.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Register an adapter version: a causal LM, or a PEFT LoRA with the LM under it as `--trunk`."""
    body: dict[str, Any] = {"name": name, "path": str(directory.expanduser().absolute())}
    if trunk is not None:
        body["trunk"] = str(trunk.expanduser().absolute())
    if prefix_token_ids is not None:
        body["prefix_token_ids"] = _token_ids(prefix_token_ids)
    if alpha is not None:
        body["default_alpha"] = alpha
    if route is not None:
        body["route"] = route
    with AdminClient(url, admin_key) as client:
        version = client.post("adapters", body=body)
    if as_json:
        print_json(version)
    else:
        print_line(f"{version['name']} {version['version']}")


def list_versions(
    name: Annotated[str | None, typer.Argument(help="Only versions of this adapter.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List adapter versions, oldest first."""
    with AdminClient(url, admin_key) as client:
        versions = client.get("adapters", *([name] if name else []))["data"]
    rows = versions if as_json else [_row(version) for version in versions]
    print_rows(rows, _COLUMNS, as_json=as_json, empty="No adapter is registered; add one with `trimtab adapters add`.")


def show(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    version: Annotated[str | None, typer.Argument(help="The newest one when left out.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Show one version with its manifest, as JSON."""
    with AdminClient(url, admin_key) as client:
        if version is not None:
            print_json(client.get("adapters", name, "versions", version))
        else:
            print_json(client.get("adapters", name)["data"][-1])


def activate(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    route: RouteName,
    version: Annotated[str | None, typer.Option(help="The newest one when left out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Its weight; the version's default when left out.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Put an adapter version on a route. Requests in flight keep the version that they began with."""
    body = {"adapter": name, "version": version, "alpha": alpha}
    with AdminClient(url, admin_key) as client:
        report_revision(client.post("routes", route, "activate", body=body), as_json=as_json)


def rollback(
    route: RouteName,
    revision: Annotated[int | None, typer.Option(help="The one before the current when left out.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Return a route to an earlier revision."""
    with AdminClient(url, admin_key) as client:
        report_revision(client.post("routes", route, "rollback", body={"revision": revision}), as_json=as_json)


_Named = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The newest version when none is named.")]


def pin(adapter: _Named, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Keep a version in the engine's memory, whether it is used or not."""
    with AdminClient(url, admin_key) as client:
        name, version = _choose(client, adapter)
        pinned = client.put("adapters", name, "versions", version, "pin", body={})
    if as_json:
        print_json(pinned)
    else:
        print_line(f"{name} {version} is pinned")


def unpin(adapter: _Named, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Let the engine give a version's memory to others while no route uses it."""
    with AdminClient(url, admin_key) as client:
        name, version = _choose(client, adapter)
        client.delete("adapters", name, "versions", version, "pin")
    print_line(f"{name} {version} is not pinned")


def retire(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    version: Annotated[str, typer.Argument(help="Version to retire; no route may use it.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Refuse new requests for a version and free its memory when its last request ends."""
    with AdminClient(url, admin_key) as client:
        retired = client.post("adapters", name, "versions", version, "retire")
    if as_json:
        print_json(retired)
    else:
        print_line(f"{name} {version} is retired")


def build_adapters_commands() -> typer.Typer:
    """The group `adapters`."""
    group = typer.Typer(no_args_is_help=True, help="Adapter versions: add, list, activate, roll back, pin, retire.")
    group.command("add")(add)
    group.command("list")(list_versions)
    group.command("show")(show)
    group.command("activate")(activate)
    group.command("rollback")(rollback)
    group.command("pin")(pin)
    group.command("unpin")(unpin)
    group.command("retire")(retire)
    return group


def _row(version: dict[str, Any]) -> dict[str, Any]:
    state = "retired" if version["retired_at"] is not None else "active" if version["routes"] else "ready"
    where, size = version["residency"]["state"], version["residency"]["weight_bytes"]
    memory = "-" if where == "on_disk" else f"{size} B" if where == "resident" else f"{where} ({size} B)"
    if version["pinned_at"] is not None:
        memory += ", pinned"
    return {**version, "default_alpha": version["manifest"]["default_alpha"], "state": state, "memory": memory}


def _choose(client: AdminClient, adapter: str) -> tuple[str, str]:
    """Name and version of `NAME[@VERSION]`; the newest version that is not retired when none is named."""
    name, _, version = adapter.partition("@")
    if version:
        return name, version
    usable = [v["version"] for v in client.get("adapters", name)["data"] if v["retired_at"] is None]
    if not usable:
        raise CommandError(f"all versions of {name} are retired; name one that is not, or add one")
    return name, usable[-1]


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as exc:
        raise CommandError(
            "--prefix-token-ids takes whole numbers with commas between, for example 50257,50258"
        ) from exc
