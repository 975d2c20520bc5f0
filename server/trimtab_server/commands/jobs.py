"""`trimtab jobs`."""

import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_json, print_line, print_rows

_COLUMNS = {
    "id": "ID",
    "name": "NAME",
    "state": "STATE",
    "worker": "WORKER",
    "progress": "PROGRESS",
    "version": "VERSION",
    "updated_at": "UPDATED (UTC)",
    "error": "ERROR",
}

_ENDED = ("succeeded", "failed", "cancelled")
_FOLLOW_S = 2.0
_FOLLOWED_TAIL = 2000

JobId = Annotated[str, typer.Argument(help="Id of the job.")]


def submit(
    config: Annotated[Path, typer.Argument(help="Training configuration, .json or .toml; - reads JSON from stdin.")],
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Queue a training job; a `trimtab trainer` takes it."""
    body = {"config": read_config(config), "name": name}
    with AdminClient(url, admin_key) as client:
        job = client.post("training-jobs", body=body)
    if as_json:
        print_json(job)
    else:
        print_line(job["id"])


def list_jobs(
    state: Annotated[
        str | None, typer.Option(help="Only queued, running, succeeded, failed or cancelled jobs.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List training jobs, newest first."""
    with AdminClient(url, admin_key) as client:
        jobs = client.get("training-jobs", params={"state": state})["data"]
    rows = jobs if as_json else [_row(job) for job in jobs]
    print_rows(rows, _COLUMNS, as_json=as_json, empty="There is no training job; queue one with `trimtab jobs submit`.")


def show(job: JobId, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Show one job with its configuration, progress and evaluation, as JSON."""
    with AdminClient(url, admin_key) as client:
        print_json(client.get("training-jobs", job))


def cancel(job: JobId, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Cancel a job; its worker stops at its next heartbeat."""
    with AdminClient(url, admin_key) as client:
        cancelled = client.post("training-jobs", job, "cancel")
    print_line(f"{cancelled['id']} is {cancelled['state']}")


def log(
    job: JobId,
    tail: Annotated[int, typer.Option(min=1, max=2000, help="Newest lines to show.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Show the end of a job's log."""
    seen = (0, 0)
    with AdminClient(url, admin_key) as client:
        while True:
            has_ended = (
                client.get("training-jobs", job)["state"] in _ENDED
            )  # asked first: then its last lines are there
            lines = client.get("training-jobs", job, "log", params={"tail": tail})["data"]
            for line in lines:
                if (place := (line["attempt"], line["number"])) > seen:
                    print_line(line["text"])
                    seen = place
            if has_ended or not follow:
                return
            tail = _FOLLOWED_TAIL
            time.sleep(_FOLLOW_S)


def metrics(
    job: JobId,
    tail: Annotated[int, typer.Option(min=1, max=2000, help="Newest lines to show.")] = 20,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the newest metrics of a job."""
    with AdminClient(url, admin_key) as client:
        lines = client.get("training-jobs", job, "metrics", params={"tail": tail})["data"]
    names = {name: name for line in lines for name in line["figures"]}
    rows = lines if as_json else [{"step": line["step"], **line["figures"]} for line in lines]
    print_rows(rows, {"step": "STEP", **names}, as_json=as_json, empty="The job has reported no metrics yet.")


def build_jobs_commands() -> typer.Typer:
    """The group `jobs`."""
    group = typer.Typer(no_args_is_help=True, help="Training jobs.")
    group.command("submit")(submit)
    group.command("list")(list_jobs)
    group.command("show")(show)
    group.command("log")(log)
    group.command("metrics")(metrics)
    group.command("cancel")(cancel)
    return group


def _row(job: dict[str, Any]) -> dict[str, Any]:
    progress = " ".join(f"{key}={value}" for key, value in job["progress"].items() if not isinstance(value, dict))
    return {**job, "progress": progress, "error": (job["error"] or "").partition("\n")[0]}


def read_config(path: Path) -> dict[str, Any]:
    """A training configuration from a file or standard input. Raises `CommandError`."""
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = raw.decode("utf-8")
        config = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as exc:
        raise CommandError(f"{path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise CommandError(f"{path} is not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {exc}") from exc
    if not isinstance(config, dict):
        raise CommandError(f"{path} must hold an object")
    return config
