"""`trimtab calibrate` and `trimtab calibrators`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_json, print_line, print_rows

_COLUMNS = {
    "id": "ID",
    "method": "METHOD",
    "reward": "REWARD",
    "status": "STATUS",
    "num_prompts": "PROMPTS",
    "num_rollouts": "ROLLOUTS",
    "error": "ERROR",
    "stale_because": "STALE BECAUSE",
}


class FitMethod(StrEnum):
    """What can be fitted ahead of requests."""

    pooled = "pooled"
    reference = "reference"


def calibrate(
    reward: Annotated[str, typer.Option(help="Name of the reward.")],
    model: Annotated[
        str, typer.Option("--model", "--route", help="The base model or a route; the base behind it is sampled.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines, each {"prompt": "..."} or {"messages": [...]}.')
    ] = None,
    rollouts_from_log: Annotated[
        bool, typer.Option("--rollouts-from-log", help="Use all logged samples of the base model.")
    ] = False,
    samples: Annotated[int, typer.Option(min=2, max=1024, help="Rollouts for each of the prompts.")] = 8,
    method: Annotated[
        FitMethod, typer.Option(help="pooled: for prompts never seen; reference: for each of these prompts.")
    ] = FitMethod.pooled,
    request: Annotated[
        str | None,
        typer.Option(help="Sampling settings as JSON, as in the requests to calibrate. Default: what the log has."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a reliability plot, such as plot.png.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was found as JSON.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Fit a calibrator from samples of the base model, and tell how good it is on samples that were held out."""
    body = {
        "reward": reward,
        "model": model,
        "method": method.value,
        "prompts": _read_prompts(prompts) if prompts is not None else [],
        "request": _settings(request) if request is not None else None,
        "from_log": rollouts_from_log,
        "samples": samples,
    }
    with AdminClient(url, admin_key) as client:
        fitted = client.post("calibrators", body=body)
    if json_file is not None:
        _write(json_file, json.dumps(fitted, indent=2))
    if plot is not None:
        _plot(fitted, plot)
    for line in describe(fitted):
        print_line(line)


def list_calibrators(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List calibrators and whether they still hold."""
    with AdminClient(url, admin_key) as client:
        found = client.get("calibrators")["data"]
    empty = "There is no calibrator; requests make those of their prompts, `trimtab calibrate` the others."
    print_rows(found, _COLUMNS, as_json=as_json, empty=empty)


def show(calibrator: Annotated[str, typer.Argument()], url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Show one calibrator, as JSON."""
    with AdminClient(url, admin_key) as client:
        print_json(client.get("calibrators", calibrator))


def delete(calibrator: Annotated[str, typer.Argument()], url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Forget one calibrator, or all per-prompt ones of a reward and its settings."""
    with AdminClient(url, admin_key) as client:
        client.delete("calibrators", calibrator)
    print_line(f"{calibrator} is deleted")


def build_calibrators_commands() -> typer.Typer:
    """The group `calibrators`."""
    group = typer.Typer(no_args_is_help=True, help="What rewards are calibrated by; `trimtab calibrate` makes them.")
    group.command("list")(list_calibrators)
    group.command("show")(show)
    group.command("delete")(delete)
    return group


def describe(fitted: dict[str, Any]) -> list[str]:
    """What a fit is worth, in lines."""
    held_out = fitted["held_out"]
    name = f"calibrator  {fitted['id']}" if fitted["id"] else "calibrators for each prompt"
    lines = [
        f"{name}, {fitted['method']}, of {fitted['reward']} on {fitted['base_model']}",
        f"settings    {json.dumps(fitted['request'])}",
        f"made from   {fitted['num_rollouts']} rollouts of {fitted['num_prompts']} prompts",
        f"held out    {held_out['num_rollouts']} rollouts of {held_out['num_prompts']} prompts",
    ]
    if "model" in held_out:
        losses = ", ".join(f"{model} {loss:.4g}" for model, loss in held_out["pinball"].items())
        lines += [
            f"model       {held_out['model']} (pinball loss: {losses})",
            f"error       {fitted['error']:.3f} root mean square per held-out prompt",
        ]
    is_uniform = held_out["ks_distance"] <= held_out["ks_critical"]
    lines += [
        f"uniform     {'yes' if is_uniform else 'NO'}: KS distance {held_out['ks_distance']:.3f}, critical value "
        f"{held_out['ks_critical']:.3f} at 5 % for n = {held_out['num_prompts']} (one rollout per prompt, ties broken "
        "at random)",
        f"            KS distance of all with half ties {held_out['ks_distance_of_all']:.3f}; "
        f"{100 * held_out['share_tied']:.1f} % of pairs are tied, and the half-tie value is uniform only without ties",
        "nominal     " + " ".join(f"{nominal:6.2f}" for nominal, _ in held_out["coverage"]),
        "measured    " + " ".join(f"{measured:6.3f}" for _, measured in held_out["coverage"]),
    ]
    return lines


def _read_prompts(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as exc:
        raise CommandError(f"{path} cannot be read: {exc}") from exc
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise CommandError(f"{path}, line {number}: not JSON ({exc})") from exc
        given = [row[key] for key in ("prompt", "messages") if key in row] if isinstance(row, dict) else []
        if len(given) != 1:
            raise CommandError(f'{path}, line {number}: not {{"prompt": "..."}} or {{"messages": [...]}}')
        prompts += given
    if not prompts:
        raise CommandError(f"{path} has no prompts")
    return prompts


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as exc:
        raise CommandError(f"--request is not JSON: {exc}") from exc
    if not isinstance(settings, dict):
        raise CommandError('--request must be an object such as {"temperature": 0.7, "max_tokens": 64}')
    return settings


def _plot(fitted: dict[str, Any], target: Path) -> None:
    from trimtab_server.calibration.reliability import plot_reliability  # noqa: PLC0415  needs matplotlib

    try:
        plot_reliability(fitted["held_out"]["values"], target, title=f"{fitted['reward']}, {fitted['method']}")
    except (OSError, ValueError) as exc:
        raise CommandError(f"{target} cannot be written: {exc}") from exc


def _write(target: Path, text: str) -> None:
    try:
        target.write_text(text + "\n", encoding="utf-8")
    except OSError as exc:
        raise CommandError(f"{target} cannot be written: {exc.strerror}") from exc
