"""`trimtab rewards`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_json, print_line, print_rows
from trimtab_server.commands.overoptimization import list_caps, overoptimization

_COLUMNS = {"name": "NAME", "kind": "KIND", "target": "TARGET", "options": "OPTIONS"}
KINDS = ("callable", "hf_classifier", "http", "keywords", "sentiment", "regex", "json_schema", "llm_judge", "composite")
"""Those of the contract, which is not imported here: it takes longer to load than most commands take to run."""

Name = Annotated[str, typer.Argument(help="Name of the reward.")]


def list_rewards(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List the rewards that requests, routes and jobs can name."""
    with AdminClient(url, admin_key) as client:
        rewards = client.get("rewards")["data"]
    print_rows(rewards, _COLUMNS, as_json=as_json, empty="There is no reward; add one with `trimtab rewards add`.")


def add(
    name: Name,
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")],
    target: Annotated[str, typer.Option(help="Entry point, directory or hub id, URL, or pattern; see the kind.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, with a JSON value or text; may be repeated.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Register a reward, or replace the one of that name; it is loaded first."""
    body = {"name": name, "kind": kind, "target": target, "options": dict(parse_option(text) for text in option or [])}
    with AdminClient(url, admin_key) as client:
        added = client.post("rewards", body=body)
    if as_json:
        print_json(added)
    else:
        print_line(f"{added['name']} version {added['version']}")


def show(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Show one reward with its version, its circuit breaker and its cache."""
    with AdminClient(url, admin_key) as client:
        print_json(client.get("rewards", name))


def remove(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Take a registered reward away."""
    with AdminClient(url, admin_key) as client:
        client.delete("rewards", name)
    print_line(f"{name} is removed")


def score(
    name: Name,
    prompt: Annotated[str, typer.Option(help="The prompt that the outputs answer.")] = "",
    output: Annotated[list[str] | None, typer.Option(help="A text to judge; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='Further texts: a line each of {"prompt": ..., "output": ...}.')
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Judge texts: one number a line, in their order."""
    inputs = [{"prompt": prompt, "output": text} for text in output or []] + (_read(file) if file is not None else [])
    if not inputs:
        raise CommandError("there is nothing to judge: give --output or --file")
    with AdminClient(url, admin_key) as client:
        scored = client.post("rewards", name, "score", body={"inputs": inputs})
    if as_json:
        print_json(scored)
    else:
        for reward in scored["rewards"]:
            print_line(f"{reward:.9g}")


def build_rewards_commands() -> typer.Typer:
    """The group `rewards`."""
    group = typer.Typer(no_args_is_help=True, help="What candidates are judged by.")
    group.command("list")(list_rewards)
    group.command("add")(add)
    group.command("show")(show)
    group.command("remove")(remove)
    group.command("score")(score)
    group.command("overoptimization")(overoptimization)
    group.command("caps")(list_caps)
    return group


def parse_option(text: str) -> tuple[str, Any]:
    """Name and value of an option: JSON where it can be read as such, else text. Raises `CommandError`."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise CommandError(f"--option {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError) as exc:
        raise CommandError(f"{file} cannot be read as JSON lines: {exc}") from exc
