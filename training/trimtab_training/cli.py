"""The commands `trimtab train`, `trainer`, `distill`, `evaluate` and `demo`. Heavy imports come after parsing."""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from trimtab_adapters.contract.errors import TrimtabError
from trimtab_training.config import GatewayConfig, TrainConfig, load_config
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption, TrainingInterrupted

if TYPE_CHECKING:
    from trimtab_training.job_feed import JobFeed
    from trimtab_training.processes import Processes
    from trimtab_training.recipes.train import TrainResult

_INTERRUPTED = 130
"""Exit status after a stop by signal, as shells give it."""


def train(argv: list[str]) -> int:
    """Train one adapter as a configuration file says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="trimtab train", description="Train an adapter LM and publish a version.")
    _add_run_arguments(parser)
    parser.add_argument(
        "--processes", type=int, default=None, metavar="N", help="processes that train together; overrides `processes`"
    )
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    _set_up_logging()
    interruption = Interruption()
    with _signals(lambda: interruption.request("released")):
        try:
            overrides = [*arguments.overrides, *_given("processes", arguments.processes)]
            config = load_config(arguments.config, overrides)
            result = _run_recipe(config, interruption, resume=arguments.resume)
        except TrimtabError as exc:
            _complain(f"trimtab train: {exc.message}")
            return 1
        except TrainingInterrupted:
            _complain("trimtab train: stopped; go on with --resume")
            return _INTERRUPTED
    _print_result(result)
    return 0


def trainer(argv: list[str]) -> int:
    """Run the training jobs of a gateway; returns the exit status."""
    parser = argparse.ArgumentParser(prog="trimtab trainer", description="Claim training jobs and run them.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway (default: %(default)s)")
    parser.add_argument("--admin-key", default=None, help="key of the admin API (default: TRIMTAB_ADMIN_KEY)")
    parser.add_argument("--worker", default=None, help="name of this worker (default: host name and process id)")
    parser.add_argument("--output-dir", type=Path, required=True, help="where jobs keep checkpoints and versions")
    parser.add_argument("--once", action="store_true", help="run one waiting job, or none, and exit")
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    _set_up_logging()
    return _run_worker(arguments)


def evaluate(argv: list[str]) -> int:
    """Compare policies behind a running gateway; returns the exit status."""
    from trimtab_training.evaluation.options import build_parser, tree_of

    arguments = _parse(build_parser(), argv)
    if isinstance(arguments, int):
        return arguments
    _set_up_logging()
    interruption = Interruption()
    with _signals(lambda: interruption.request("released")):
        try:
            _run_evaluation(tree_of(arguments), interruption, admin_key=arguments.admin_key)
        except TrimtabError as exc:
            _complain(f"trimtab evaluate: {exc.message}")
            return 1
        except TrainingInterrupted:
            _complain("trimtab evaluate: stopped; the same command with --work-dir goes on from its samples")
            return _INTERRUPTED
    return 0


def distill(argv: list[str]) -> int:
    """Distil a student from a base's samples, as a configuration file says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="trimtab distill",
        description="Train a student that stands in for a base model in training, and measure how close it is.",
    )
    _add_run_arguments(parser)
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    _set_up_logging()
    interruption = Interruption()
    with _signals(lambda: interruption.request("released")):
        try:
            _run_distillation(arguments, interruption)
        except TrimtabError as exc:
            _complain(f"trimtab distill: {exc.message}")
            return 1
        except TrainingInterrupted:
            _complain("trimtab distill: stopped; go on with --resume")
            return _INTERRUPTED
    return 0


def demo(argv: list[str]) -> int:
    """Run the demonstration; returns its exit status."""
    from trimtab_training.demo.run import main

    return main(argv)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML or JSON configuration")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")


def _run_distillation(arguments: argparse.Namespace, interruption: Interruption) -> None:
    from transformers.utils import logging as transformers_logging

    from trimtab_training.distillation.building import built_teacher
    from trimtab_training.distillation.config import load_distill_config
    from trimtab_training.recipes.distill import distill as run

    transformers_logging.disable_progress_bar()
    config = load_distill_config(arguments.config, tuple(arguments.overrides))
    with built_teacher(config, interruption) as teacher:
        result = run(config, teacher, interruption=interruption, resume=arguments.resume)
    table = Table("nats per token on the teacher's own samples", "log p - log p̂", "95 %", "the teacher's -log p")
    rows = [("start", result.before)] + ([("student", result.after)] if result.path is not None else [])
    for label, found in rows:
        low, high = found.interval
        table.add_row(label, f"{found.log_ratio:.4f}", f"{low:.4f} to {high:.4f}", f"{found.teacher_nll:.4f}")
    console = Console()
    console.print(table)
    if result.path is not None:
        console.print(f"student in {result.path}", markup=False, highlight=False, soft_wrap=True)


def _run_worker(arguments: argparse.Namespace) -> int:
    from trimtab_training.worker import Worker

    admin_key = arguments.admin_key or os.environ.get("TRIMTAB_ADMIN_KEY")

    def recipe(config: TrainConfig, interruption: Interruption, feed: "JobFeed") -> "TrainResult":
        return _run_recipe(config, interruption, resume=True, feed=feed, admin_key=admin_key)

    with GatewayClient(arguments.url, admin_key=admin_key, timeout_s=30.0, retry_for_s=60.0) as gateway:
        worker = Worker(
            gateway,
            name=arguments.worker or f"{socket.gethostname()}-{os.getpid()}",
            url=arguments.url,
            output_dir=arguments.output_dir.resolve(),
            recipe=recipe,
        )
        with _signals(worker.stop):
            try:
                worker.run(once=arguments.once)
            except TrimtabError as exc:
                _complain(f"trimtab trainer: {exc.message}")
                return 1
    return 0


def _run_evaluation(tree: Mapping[str, Any], interruption: Interruption, *, admin_key: str | None) -> None:
    from trimtab_training.evaluation.report import write_csv, write_json
    from trimtab_training.evaluation.run import evaluate as run
    from trimtab_training.evaluation.sample_cache import MemorySamples, SampleFile
    from trimtab_training.evaluation.settings import parse_config
    from trimtab_training.evaluation.tables import report_tables

    config = parse_config(tree)
    with ExitStack() as stack:
        cache = MemorySamples() if config.work_dir is None else stack.enter_context(SampleFile(config.work_dir))
        gateway = stack.enter_context(_connect(config.gateway, interruption, admin_key=admin_key))
        report = run(config, gateway, cache, interruption=interruption)
    console = Console()
    for part in report_tables(report):
        console.print(part)
    output = config.output
    if output.json_file is not None:
        write_json(report, output.json_file)
    if output.csv_file is not None:
        write_csv(report, output.csv_file)
    if output.plot_file is not None:
        from trimtab_training.evaluation.plot import write_plot

        write_plot(report, output.plot_file)


def _connect(config: GatewayConfig, interruption: Interruption, *, admin_key: str | None) -> GatewayClient:
    return GatewayClient(
        config.url,
        admin_key=admin_key or os.environ.get(config.admin_key_env),
        api_key=os.environ.get(config.api_key_env),
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        retry_for_s=config.retry_for_s,
        interruption=interruption,
    )


def _run_recipe(
    config: TrainConfig,
    interruption: Interruption,
    *,
    resume: bool,
    feed: "JobFeed | None" = None,
    admin_key: str | None = None,
) -> "TrainResult":
    from transformers.utils import logging as transformers_logging

    from trimtab_training.recipes.train import train as run

    transformers_logging.disable_progress_bar()  # a bar for every load and save would tear ours apart
    with ExitStack() as stack:
        gateway = None
        if config.gateway is not None:
            gateway = stack.enter_context(_connect(config.gateway, interruption, admin_key=admin_key))
        return run(
            config,
            gateway=gateway,
            interruption=interruption,
            report=feed,
            listener=feed.metrics.add if feed is not None else None,
            resume=resume,
            wait_for_directory=feed is not None,
            processes=stack.enter_context(_processes_of(config)),
        )


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace | int:
    try:
        return parser.parse_args(argv)
    except SystemExit as exc:  # argparse has said what is wrong, or printed its help
        return exc.code if isinstance(exc.code, int) else 1


def _processes_of(config: TrainConfig) -> "AbstractContextManager[Processes]":
    if config.processes == 1:
        from trimtab_training.processes import SingleProcess

        return nullcontext(SingleProcess())
    from trimtab_training.launching import launched

    return launched(config)


def _given(key: str, value: object) -> list[str]:
    """An option as an override; none when it was left out."""
    return [] if value is None else [f"{key}={value}"]


def _complain(message: str) -> None:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGTERM and SIGINT; a second SIGINT ends the process as usual."""

    def handle(number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    saved = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def _print_result(result: "TrainResult") -> None:
    console = Console()
    if "base" in result.evaluation:
        console.print(_table(result.evaluation))
    console.print(f"version {result.version} in {result.path}", markup=False, highlight=False, soft_wrap=True)
    gate = result.evaluation["gate"]
    what = "passed" if gate["passed"] else f"not passed: {'; '.join(gate['reasons'])}"
    console.print(f"gate {what}", markup=False, highlight=False, soft_wrap=True)
    if result.activated_route is not None:
        what = "tries it as a canary" if result.is_canary else "now uses it"
        console.print(f"route {result.activated_route} {what}", markup=False, highlight=False)


def _table(evaluation: Mapping[str, Any]) -> Table:
    table = Table("held-out prompts", "base", "steered")
    rows = {
        "mean reward": "mean_reward",
        "perplexity under base": "base_perplexity",
        "distinct-2": "distinct_2",
        "tokens": "mean_tokens",
    }
    for label, key in rows.items():
        table.add_row(label, *(_number(evaluation[who][key]) for who in ("base", "steered")))
    ends = evaluation["reward_difference_interval"]
    interval = "" if ends is None else f" (95 %: {ends[0]:.4g} to {ends[1]:.4g})"
    table.add_row("reward difference", "", f"{evaluation['reward_difference']:.4g}{interval}")
    table.add_row("win rate against base", "", _number(evaluation["win_rate"]))
    if evaluation["procedure"] != "standard":
        table.add_row(f"win rate, {evaluation['procedure']}", "", _number(evaluation["served_win_rate"]))
    table.add_row("KL to base, nats per token", "", _number(evaluation["kl_per_token"]))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
