"""`trimtab rollouts`."""

from collections.abc import Mapping
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
_NOT_CONDITIONS = ("output", "export_format", "limit", "url", "admin_key", "as_json")
_SWITCHES = ("chosen_only", "whole_requests")


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
BaseModelName = Annotated[
    str | None, typer.Option("--base-model", help="Only rollouts of the base model of this public name.")
]
Steered = Annotated[
    bool | None, typer.Option("--steered/--unsteered", help="Only rollouts that an adapter steered, or none did.")
]
RequestId = Annotated[str | None, typer.Option(help="Only rollouts of the answer with this id.")]
ChosenOnly = Annotated[bool, typer.Option("--chosen-only", help="Only candidates that were returned.")]
HasFeedback = Annotated[
    bool | None, typer.Option("--with-feedback/--without-feedback", help="Only rollouts with feedback, or without.")
]
MinRating = Annotated[float | None, typer.Option(help="Only rollouts whose ratings have at least this mean.")]
MaxRating = Annotated[float | None, typer.Option(help="Only rollouts whose ratings have at most this mean.")]
Reward = Annotated[str | None, typer.Option(help="Only rollouts that this reward scored.")]
MinReward = Annotated[float | None, typer.Option(help="Only rollouts to which --reward gave at least this.")]
MaxReward = Annotated[float | None, typer.Option(help="Only rollouts to which --reward gave at most this.")]
MinCalibrated = Annotated[float | None, typer.Option(help="Only rollouts of at least this calibrated --reward.")]
MaxCalibrated = Annotated[float | None, typer.Option(help="Only rollouts of at most this calibrated --reward.")]
WholeRequests = Annotated[
    bool,
    typer.Option("--whole-requests", help="With conditions on feedback or reward: all candidates of such requests."),
]


def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    export_format: Annotated[Format, typer.Option("--format", help="File format.")] = Format.parquet,
    route: Route = None,
    adapter: Adapter = None,
    version: Version = None,
    endpoint: Endpoint = None,
    since: Since = None,
    until: Until = None,
    base_model: BaseModelName = None,
    steered: Steered = None,
    request_id: RequestId = None,
    chosen_only: ChosenOnly = False,
    has_feedback: HasFeedback = None,
    min_rating: MinRating = None,
    max_rating: MaxRating = None,
    reward: Reward = None,
    min_reward: MinReward = None,
    max_reward: MaxReward = None,
    min_calibrated: MinCalibrated = None,
    max_calibrated: MaxCalibrated = None,
    whole_requests: WholeRequests = False,
    limit: Annotated[int | None, typer.Option(help="Most rollouts to export, oldest first.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Write logged rollouts to a file, oldest first."""
    filters = _filters(context.params)
    params = {**filters, "limit": limit, "format": export_format.value}
    with AdminClient(url, admin_key) as client:
        size_bytes = client.download("rollouts", "export", params=params, target=output)
    print_line(f"{output}: {size_bytes} bytes")


def list_rollouts(
    context: typer.Context,
    route: Route = None,
    adapter: Adapter = None,
    version: Version = None,
    endpoint: Endpoint = None,
    since: Since = None,
    until: Until = None,
    base_model: BaseModelName = None,
    steered: Steered = None,
    request_id: RequestId = None,
    chosen_only: ChosenOnly = False,
    has_feedback: HasFeedback = None,
    min_rating: MinRating = None,
    max_rating: MaxRating = None,
    reward: Reward = None,
    min_reward: MinReward = None,
    max_reward: MaxReward = None,
    min_calibrated: MinCalibrated = None,
    max_calibrated: MaxCalibrated = None,
    whole_requests: WholeRequests = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most rollouts to list, oldest first.")] = 20,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List logged rollouts, oldest first."""
    filters = _filters(context.params)
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


def _filters(options: Mapping[str, Any]) -> dict[str, str]:
    """The query parameters among a command's options; what is not given, or not switched on, is left out."""
    given = {name: value for name, value in options.items() if value is not None and name not in _NOT_CONDITIONS}
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value or name not in _SWITCHES
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
