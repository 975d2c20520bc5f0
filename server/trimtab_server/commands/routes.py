"""`trimtab routes`."""

import re
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import describe_steering, print_json, print_line, print_rows

_COLUMNS = {
    "route": "ROUTE",
    "revision": "REVISION",
    "steering": "STEERING",
    "best_of": "BEST OF",
    "reward": "REWARD",
    "created_at": "CREATED (UTC)",
    "comment": "COMMENT",
}
_TERM = re.compile(r"(?P<name>[^@=]+)(?:@(?P<version>[^=]+))?(?:=(?P<alpha>.+))?")

Name = Annotated[str, typer.Argument(help="Public model name of the route.")]


def list_routes(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List the current revision of each route."""
    with AdminClient(url, admin_key) as client:
        _print_revisions(client.get("routes")["data"], as_json=as_json)


def show(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Show the current revision of a route, as JSON."""
    with AdminClient(url, admin_key) as client:
        print_json(client.get("routes", name))


def set_route(
    name: Name,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME[@VERSION][=ALPHA]; repeat it to mix adapters.")
    ] = None,
    best_of: Annotated[int | None, typer.Option(help="Candidates per prompt.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward that ranks the candidates.")] = None,
    comment: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a route or replace its whole state. Without adapters it is the base model under another name."""
    body = {
        "steering": {"adapters": [parse_term(term) for term in adapter or []]},
        "best_of": best_of,
        "reward": reward,
        "comment": comment,
    }
    with AdminClient(url, admin_key) as client:
        report_revision(client.put("routes", name, body=body), as_json=as_json)


def activate(
    name: Name,
    adapter: Annotated[str, typer.Argument(help="Name of the adapter.")],
    version: Annotated[str | None, typer.Option(help="The newest one when left out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Its weight; the version's default when left out.")] = None,
    comment: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Put an adapter version on the route; its best-of and reward stay."""
    body = {"adapter": adapter, "version": version, "alpha": alpha, "comment": comment}
    with AdminClient(url, admin_key) as client:
        report_revision(client.post("routes", name, "activate", body=body), as_json=as_json)


def rollback(
    name: Name,
    revision: Annotated[int | None, typer.Option(help="The one before the current when left out.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Return the route to an earlier revision."""
    with AdminClient(url, admin_key) as client:
        report_revision(client.post("routes", name, "rollback", body={"revision": revision}), as_json=as_json)


def history(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List all revisions that the route ever had, oldest first."""
    with AdminClient(url, admin_key) as client:
        _print_revisions(client.get("routes", name, "history")["data"], as_json=as_json)


def delete(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Delete the route; its history stays."""
    with AdminClient(url, admin_key) as client:
        client.delete("routes", name)
    print_line(f"the route {name} is deleted")


def build_routes_commands() -> typer.Typer:
    """The group `routes`."""
    group = typer.Typer(no_args_is_help=True, help="Routes: public model names with steering and defaults.")
    group.command("list")(list_routes)
    group.command("show")(show)
    group.command("set")(set_route)
    group.command("activate")(activate)
    group.command("rollback")(rollback)
    group.command("history")(history)
    group.command("delete")(delete)
    return group


def parse_term(text: str) -> dict[str, Any]:
    """`NAME[@VERSION][=ALPHA]` as the admin API wants it. Raises `CommandError`."""
    match = _TERM.fullmatch(text)
    try:
        if match is None:
            raise ValueError("no name")
        alpha = float(match["alpha"]) if match["alpha"] else None
    except ValueError as exc:
        raise CommandError(f"--adapter {text!r} is not NAME[@VERSION][=ALPHA], for example kind=1.0") from exc
    return {"name": match["name"], "version": match["version"], "alpha": alpha}


def report_revision(revision: dict[str, Any], *, as_json: bool) -> None:
    """Print what a route is now."""
    if as_json:
        print_json(revision)
    else:
        steering = describe_steering(revision["steering"])
        print_line(f"{revision['route']} is at revision {revision['revision']}: {steering}")


def _print_revisions(revisions: list[dict[str, Any]], *, as_json: bool) -> None:
    rows = revisions if as_json else [{**r, "steering": describe_steering(r["steering"])} for r in revisions]
    print_rows(rows, _COLUMNS, as_json=as_json, empty="There is no route; make one with `trimtab routes set`.")
