"""`trimtab rewards`."""

import json
from typing import Annotated

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_json, print_line, print_rows
from trimtab_server.commands.overoptimization import list_caps, overoptimization

_COLUMNS = {"name": "NAME", "kind": "KIND", "target": "TARGET", "options": "OPTIONS"}


def list_rewards(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List the rewards that requests, routes and jobs can name."""
    with AdminClient(url, admin_key) as client:
        rewards = client.get("rewards")["data"]
    print_rows(rewards, _COLUMNS, as_json=as_json, empty="There is no reward; add one with `trimtab rewards add`.")


def add(
    name: Annotated[str, typer.Argument(help="Name of the reward.")],
    kind: Annotated[str, typer.Option(help="callable or hf_classifier.")],
    target: Annotated[str, typer.Option(help="Entry point for callable; directory or hub id for hf_classifier.")],
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Register a reward, or replace the one of that name; it is loaded first."""
    body = {"name": name, "kind": kind, "target": target, "options": dict(_option(text) for text in option or [])}
    with AdminClient(url, admin_key) as client:
        added = client.post("rewards", body=body)
    if as_json:
        print_json(added)
    else:
        print_line(f"{added['name']} version {added['version']}")


def build_rewards_commands() -> typer.Typer:
    """The group `rewards`."""
    group = typer.Typer(no_args_is_help=True, help="What candidates are judged by.")
    group.command("list")(list_rewards)
    group.command("add")(add)
    group.command("overoptimization")(overoptimization)
    group.command("caps")(list_caps)
    return group


def _option(text: str) -> tuple[str, str | int | float | bool]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise CommandError(f"--option {text!r} is not KEY=VALUE")
    try:
        parsed = json.loads(value)
    except ValueError:
        return key, value
    return key, parsed if isinstance(parsed, str | int | float | bool) else value
