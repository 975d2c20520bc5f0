"""`trimtab rollouts`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import describe_steering, print_line, print_rows

_COLUMNS = {
    "id": "ID",
    "created_at": "CREATED (UTC)",
    "route": "ROUTE",
    "steering": "STEERING",
    "chosen": "CHOSEN",
    "reward": "REWARD",
    "num_tokens": "TOKENS",
    "text": "OUTPUT",
}
_EXCERPT = 60


class Format(StrEnum):
    """File formats of an export."""

    parquet = "parquet"
    jsonl = "jsonl"


Route = Annotated[str | None, typer.Option(help="Only rollouts of this route.")]
Adapter = Annotated[str | None, typer.Option(help="Only rollouts steered by this adapter.")]
Version = Annotated[str | None, typer.Option(help="Only rollouts steered by this version.")]
Endpoint = Annotated[
    str | None, typer.Option(help="Only rollouts of completions, chat.completions, reference or training.")
]
Since = Annotated[float | None, typer.Option(help="Only rollouts completed at or after this Unix time.")]
Until = Annotated[float | None, typer.Option(help="Only rollouts completed before this Unix time.")]
ChosenOnly = Annotated[bool, typer.Option("--chosen-only", help="Only candidates that were returned.")]


def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    export_format: Annotated[Format, typer.Option("--format", help="File format.")] = Format.parquet,
    route: Route = None,
    adapter: Adapter = None,
    version: Version = None,
    endpoint: Endpoint = None,
    since: Since = None,
    until: Until = None,
    chosen_only: ChosenOnly = False,
    limit: Annotated[int | None, typer.Option(help="Most rollouts to export, oldest first.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Write logged rollouts to a file, oldest first."""
    filters = _filters(route, adapter, version, endpoint, since, until, chosen_only)
    params = {**filters, "limit": limit, "format": export_format.value}
    with AdminClient(url, admin_key) as client:
        size_bytes = client.download("rollouts", "export", params=params, target=output)
    print_line(f"{output}: {size_bytes} bytes")


def list_rollouts(
    route: Route = None,
    adapter: Adapter = None,
    version: Version = None,
    endpoint: Endpoint = None,
    since: Since = None,
    until: Until = None,
    chosen_only: ChosenOnly = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most rollouts to list, oldest first.")] = 20,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List logged rollouts, oldest first."""
    filters = _filters(route, adapter, version, endpoint, since, until, chosen_only)
    with AdminClient(url, admin_key) as client:
        found = client.get("rollouts", params={**filters, "limit": limit})["data"]
    rows = found if as_json else [_row(rollout) for rollout in found]
    print_rows(rows, _COLUMNS, as_json=as_json, empty="No rollout matches.")


def build_rollouts_commands() -> typer.Typer:
    """The group `rollouts`."""
    group = typer.Typer(no_args_is_help=True, help="The log of all candidates.")
    group.command("export")(export)
    group.command("list")(list_rollouts)
    return group


def _filters(
    route: str | None,
    adapter: str | None,
    version: str | None,
    endpoint: str | None,
    since: float | None,
    until: float | None,
    chosen_only: bool,
) -> dict[str, Any]:
    return {
        "route": route,
        "adapter": adapter,
        "version": version,
        "endpoint": endpoint,
        "since": since,
        "until": until,
        "chosen_only": "true" if chosen_only else None,
    }


def _operators(sampling: dict[str, Any]) -> dict[str, Any]:
    guidance = sampling.get("guidance")
    of_guidance = {"negative_prompt": "", "guidance_scale": guidance["scale"]} if guidance else {}
    return {**sampling.get("steering_operators", {}), **of_guidance}


def _row(rollout: dict[str, Any]) -> dict[str, Any]:
    text = " ".join(rollout["output_text"].split())
    rewards = [f"{reward['name']}={reward['raw']:.4g}" for reward in rollout["rewards"]]
    return {
        **rollout,
        "steering": describe_steering(rollout["steering"], _operators(rollout["sampling"])),
        "chosen": "yes" if rollout["chosen"] else "no",
        "reward": rewards,
        "num_tokens": len(rollout["output_token_ids"]),
        "text": text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "...",
    }
