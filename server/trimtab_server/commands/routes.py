"""`trimtab routes`."""

import json
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
    schedule_start: Annotated[int | None, typer.Option(help="First generated token to steer, from 0.")] = None,
    schedule_first: Annotated[int | None, typer.Option(help="How many tokens to steer from there on.")] = None,
    schedule_decay: Annotated[float | None, typer.Option(help="Factor on alpha from each token to the next.")] = None,
    plausibility: Annotated[
        float | None, typer.Option(help="Leave only tokens with this fraction of the base's largest probability.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Most nats per token that steering may move the base.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Steer away from how the base goes on after this text (completions).")
    ] = None,
    negative_messages: Annotated[
        str | None, typer.Option(help="The same for chat: a JSON array of messages with role and content.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How far to steer away from it.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Candidates per prompt.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward that ranks the candidates.")] = None,
    comment: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a route or replace its whole state. Without any steering it is the base model under another name."""
    schedule = _given(start=schedule_start, first=schedule_first, decay=schedule_decay)
    operators = _given(
        schedule=schedule or None,
        plausibility=plausibility,
        max_kl=max_kl,
        negative_prompt=_negative_prompt(negative_prompt, negative_messages),
        guidance_scale=guidance_scale,
    )
    body = {
        "steering": {"adapters": [parse_term(term) for term in adapter or []], **operators},
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
    """Put an adapter version on the route; its operators, best-of and reward stay."""
    body = {"adapter": adapter, "version": version, "alpha": alpha, "comment": comment}
    with AdminClient(url, admin_key) as client:
        report_revision(client.post("routes", name, "activate", body=body), as_json=as_json)


def promote(
    name: Name,
    adapter: Annotated[str, typer.Argument(help="Name of the adapter.")],
    version: Annotated[str | None, typer.Option(help="The newest one when left out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Its weight; the version's default when left out.")] = None,
    percent: Annotated[float, typer.Option(help="Share of the route's requests that try it.")] = 10.0,
    answers: Annotated[int, typer.Option(help="Requests of that share after which it takes the whole route.")] = 400,
    min_answers: Annotated[int, typer.Option(help="With fewer when the time is up it is rolled back.")] = 20,
    timeout_s: Annotated[float, typer.Option(help="Seconds after which it ends.")] = 3600.0,
    force: Annotated[bool, typer.Option("--force", help="Although it has not passed its gate.")] = False,
    comment: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Let a share of the route's requests try a version; it is promoted, or rolled back where it is worse."""
    body = {"adapter": adapter, "version": version, "alpha": alpha, "percent": percent, "num_answers": answers}
    body |= {"min_answers": min_answers, "timeout_s": timeout_s, "force": force, "comment": comment}
    with AdminClient(url, admin_key) as client:
        report_revision(client.post("routes", name, "promote", body=body), as_json=as_json)


def canary(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Show what came of the requests that try a new version, and of the others, as JSON."""
    with AdminClient(url, admin_key) as client:
        print_json(client.get("routes", name, "canary"))


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
    group.command("promote")(promote)
    group.command("canary")(canary)
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
        steering = _described(revision)
        print_line(f"{revision['route']} is at revision {revision['revision']}: {steering}")


def _described(revision: dict[str, Any]) -> str:
    described = describe_steering(revision["steering"], revision.get("operators") or {})
    canary = revision.get("canary")
    if canary is None:
        return described
    return f"{described}, and for {canary['percent']:g} % {describe_steering(canary['steering'])}"


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _negative_prompt(text: str | None, messages: str | None) -> Any:
    if messages is None:
        return text
    if text is not None:
        raise CommandError("give either --negative-prompt or --negative-messages")
    try:
        return json.loads(messages)
    except ValueError as exc:
        raise CommandError(f"--negative-messages is not JSON: {exc}") from exc


def _print_revisions(revisions: list[dict[str, Any]], *, as_json: bool) -> None:
    rows = revisions if as_json else [{**r, "steering": _described(r)} for r in revisions]
    print_rows(rows, _COLUMNS, as_json=as_json, empty="There is no route; make one with `trimtab routes set`.")
