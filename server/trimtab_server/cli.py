"""The `trimtab` command.

Sub-commands for operators talk to the admin API over HTTP. Those that are programs of their own (`engine`, `train`,
`trainer`, `evaluate`, `demo`) are entry points of the group `trimtab.commands`: callables `main(argv) -> int`,
imported only when they are called and given their arguments untouched.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated

import typer

from trimtab_server.commands.adapters import build_adapters_commands
from trimtab_server.commands.calibrate import build_calibrators_commands, calibrate
from trimtab_server.commands.engines import list_engines
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.jobs import build_jobs_commands
from trimtab_server.commands.rewards import build_rewards_commands
from trimtab_server.commands.rollouts import build_rollouts_commands
from trimtab_server.commands.routes import build_routes_commands
from trimtab_server.commands.schedules import build_schedules_commands
from trimtab_server.commands.serve import serve

GROUP = "trimtab.commands"
_PROGRAMS = {
    "engine": "Start an engine alone: a vLLM server with Trimtab's steering.",
    "train": "Train an adapter LM from a configuration file.",
    "trainer": "Work on the gateway's training jobs.",
    "evaluate": "Compare policies behind a gateway: win rates, KL, a plot.",
    "demo": "See it all on one machine: serve, log, train, swap in, compare.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    programs = {point.name: point for point in entry_points(group=GROUP)}
    try:
        if arguments and arguments[0] in programs:
            return _run_program(programs[arguments[0]], arguments[1:])
        build_app(programs)(args=arguments, prog_name="trimtab")
    except CommandError as exc:
        typer.echo(f"trimtab: {exc}", err=True)
        return 1
    except SystemExit as exc:  # how typer reports its own status
        return exc.code if isinstance(exc.code, int) else 1 if exc.code else 0
    return 0


def build_app(programs: Mapping[str, EntryPoint]) -> typer.Typer:
    """All sub-commands. `programs` are listed in the help; `main` runs them before it comes to this."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Steer a large language model with a small adapter LM, and serve the pair.",
    )
    app.callback()(_root)
    app.command("serve")(serve)
    for name in sorted(programs, key=lambda name: list(_PROGRAMS).index(name) if name in _PROGRAMS else len(_PROGRAMS)):
        app.command(name, help=_PROGRAMS.get(name, f"Provided by {programs[name].module}."), add_help_option=False)(
            _program
        )
    app.add_typer(build_adapters_commands(), name="adapters")
    app.add_typer(build_routes_commands(), name="routes")
    app.add_typer(build_rollouts_commands(), name="rollouts")
    app.add_typer(build_rewards_commands(), name="rewards")
    app.command("calibrate")(calibrate)
    app.add_typer(build_calibrators_commands(), name="calibrators")
    app.add_typer(build_jobs_commands(), name="jobs")
    app.add_typer(build_schedules_commands(), name="schedules")
    app.command("engines")(list_engines)
    return app


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"trimtab {version('trimtab')}")
        raise typer.Exit


def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the sub-command."""


def _program() -> None:
    """Stands in the help for a program of its own."""
    raise CommandError("write the command's name first: `trimtab NAME ...`")


def _run_program(point: EntryPoint, arguments: list[str]) -> int:
    try:
        program = point.load()
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"`trimtab {point.name}` needs packages that are not installed here ({exc}); see the README's set-up"
        ) from exc
    return int(program(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
