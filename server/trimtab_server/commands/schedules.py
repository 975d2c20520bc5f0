"""`trimtab schedules`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.jobs import read_config
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_json, print_line, print_rows

_COLUMNS = {
    "name": "NAME",
    "state": "STATE",
    "when": "WHEN",
    "last_job": "LAST JOB",
    "last_reason": "REASON",
    "looked_at": "LAST LOOK (UTC)",
}

ScheduleName = Annotated[str, typer.Argument(help="Name of the schedule.")]


def add(
    name: Annotated[str, typer.Argument(help="A name for the schedule.")],
    config: Annotated[Path, typer.Argument(help="Training configuration, .json or .toml; - reads JSON from stdin.")],
    route: Annotated[str | None, typer.Option(help="Whose rollouts are watched.")] = None,
    new_rollouts: Annotated[int | None, typer.Option(min=1, help="Train after so many usable rollouts.")] = None,
    hours: Annotated[float | None, typer.Option(help="Train every so many hours.")] = None,
    drift_reward: Annotated[str | None, typer.Option(help="Train when this logged reward falls.")] = None,
    drift_window: Annotated[int, typer.Option(min=30, help="Requests that are compared with as many others.")] = 200,
    drift_false_alarm: Annotated[
        float, typer.Option(help="Odds of training though nothing changed, a window.")
    ] = 0.001,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Train again and again: after so many rollouts or hours, or when a reward falls."""
    body: dict[str, Any] = {"name": name, "config": read_config(config)}
    every = {"new_rollouts": new_rollouts, "hours": hours}
    if given := {key: value for key, value in every.items() if value is not None}:
        body["every"] = given
    if drift_reward is not None:
        body["drift"] = {"reward": drift_reward, "window": drift_window, "false_alarm": drift_false_alarm}
    if route is not None:
        body["route"] = route
    with AdminClient(url, admin_key) as client:
        schedule = client.post("training-schedules", body=body)
    if as_json:
        print_json(schedule)
    else:
        print_line(f"{name}: {_when(schedule)}")


def list_schedules(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List training schedules."""
    with AdminClient(url, admin_key) as client:
        schedules = client.get("training-schedules")["data"]
    rows = schedules if as_json else [_row(schedule) for schedule in schedules]
    empty = "There is no training schedule; add one with `trimtab schedules add`."
    print_rows(rows, _COLUMNS, as_json=as_json, empty=empty)


def show(name: ScheduleName, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Show one schedule with its configuration, its last look and its jobs, as JSON."""
    with AdminClient(url, admin_key) as client:
        print_json(client.get("training-schedules", name))


def delete(name: ScheduleName, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Delete a schedule; its jobs stay."""
    with AdminClient(url, admin_key) as client:
        client.delete("training-schedules", name)
    print_line(f"{name} is deleted")


def pause(name: ScheduleName, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Post no jobs until `resume`."""
    with AdminClient(url, admin_key) as client:
        client.post("training-schedules", name, "pause")
    print_line(f"{name} is paused")


def resume(name: ScheduleName, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Post jobs again."""
    with AdminClient(url, admin_key) as client:
        client.post("training-schedules", name, "resume")
    print_line(f"{name} goes on")


def build_schedules_commands() -> typer.Typer:
    """The group `schedules`."""
    group = typer.Typer(no_args_is_help=True, help="Training jobs that are posted by themselves.")
    group.command("add")(add)
    group.command("list")(list_schedules)
    group.command("show")(show)
    group.command("delete")(delete)
    group.command("pause")(pause)
    group.command("resume")(resume)
    return group


def _row(schedule: dict[str, Any]) -> dict[str, Any]:
    last = schedule["runs"][0] if schedule["runs"] else {"job_id": None, "state": "", "reason": {}}
    looked_at = schedule["last_look"].get("at")
    return {
        "name": schedule["name"],
        "state": "paused" if schedule["is_paused"] else "running" if schedule["is_running"] else "waiting",
        "when": _when(schedule),
        "last_job": last["job_id"] and f"{last['job_id']} ({last['state']})",
        "last_reason": ", ".join(last["reason"]),
        "looked_at": looked_at and datetime.fromtimestamp(looked_at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
    }


def _when(schedule: dict[str, Any]) -> str:
    every, drift, route = schedule["every"] or {}, schedule["drift"], schedule["route"]
    parts = []
    if every.get("hours") is not None:
        parts.append(f"every {every['hours']:g} h")
    if every.get("new_rollouts") is not None:
        parts.append(f"after {every['new_rollouts']} rollouts of {route}")
    if drift is not None:
        parts.append(f"when {drift['reward']} of {route} falls")
    return ", ".join(parts)
