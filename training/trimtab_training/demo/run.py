"""`trimtab demo`: the whole loop on one machine, without a hub, in a few minutes on two cores.

Makes a base LM and an adapter LM of a small world, serves them, logs rollouts, trains the adapter by Quark as a job,
switches the route to the new version while streams run, compares four systems, and goes on serving. Everything after
the model building happens through the HTTP API of a real `trimtab serve`, whose engine is a real vLLM.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trimtab_adapters.contract.errors import TrimtabError
from trimtab_training.demo import world
from trimtab_training.demo.evaluation import (
    REWARD,
    SAMPLING,
    SYSTEMS,
    Figures,
    figures_table,
    footnotes,
    measure,
    samples_table,
)
from trimtab_training.demo.gateway import Gateway
from trimtab_training.demo.processes import (
    BASE_MODEL,
    ROUTE,
    Child,
    child_environment,
    is_port_free,
    running,
    serve_command,
    signals_as_interrupts,
    trainer_command,
)
from trimtab_training.demo.swap import SwapReport, switch_under_streams

if TYPE_CHECKING:
    from trimtab_training.demo.tiny_lm import DemoModels

_HOST: Final = "127.0.0.1"
_INTERRUPTED: Final = 130
_TRAIN_SEED: Final = 11
_EVAL_SEED: Final = 12
_CANDIDATES_PER_PROMPT: Final = 3
_READY_TIMEOUT_S: Final = 300.0
_STREAM_TOKENS: Final = 150


def main(argv: list[str]) -> int:
    """Run the demonstration; returns the exit status: 0, 1 after an error, 130 when stopped before the table."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as exc:  # argparse has said what is wrong, or printed its help
        return exc.code if isinstance(exc.code, int) else 1
    # Read when torch is loaded. Threads that spin while they wait make training ten times slower beside others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    work_dir = options.work_dir or Path(tempfile.mkdtemp(prefix="trimtab-demo-"))
    demo = Demo(options, console, work_dir)
    status = 0
    with signals_as_interrupts():
        try:
            demo.run()
        except KeyboardInterrupt:
            console.print("stopped")
            status = 0 if demo.is_serving else _INTERRUPTED
        except (TrimtabError, OSError) as exc:
            Console(stderr=True, highlight=False).print(
                f"trimtab demo: {exc}", style="red", markup=False, soft_wrap=True
            )
            console.print(f"the logs are in {work_dir}", markup=False, soft_wrap=True)
            return 1
    if options.work_dir is None:
        shutil.rmtree(work_dir, ignore_errors=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab demo", description="Serve, log, train, swap in and compare, on one machine."
    )
    parser.add_argument("--exit", action="store_true", help="end after the table instead of serving on")
    parser.add_argument(
        "--port", type=_between(1, 65535), default=8000, help="port of the gateway (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=_between(2, 10_000), default=200, help="held-out prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--train-prompts",
        type=_between(10, 100_000),
        default=400,
        help="prompts to log rollouts of (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=_between(1, 1_000_000), default=480, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--cache-dir", type=Path, help="where the models are kept (default: ~/.cache/trimtab)")
    parser.add_argument(
        "--work-dir", type=Path, help="keep database, logs and versions here (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return parser


def _between(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be between {least} and {most}")
        return value

    parse.__name__ = "number"  # argparse names it in its message
    return parse


def job_config(models: "DemoModels", *, steps: int) -> dict[str, Any]:
    """The training job: Quark from the logged rollouts of the base and fresh ones of the policy as it learns."""
    return {
        "models": {"base_model": str(models.base), "adapter": str(models.adapter)},
        "reward": {"name": REWARD},
        "prompts": {"type": "log"},
        "logged": {"route": BASE_MODEL, "endpoint": "completions"},
        "fresh": {"model": BASE_MODEL, "interval": max(1, steps // 3), "prompts_per_round": 256},
        "sampling": {"max_tokens": SAMPLING["max_tokens"], "stop": list(SAMPLING["stop"])},
        # Few quantiles and many small steps: the adapter LM must first learn what a control token means.
        "objective": {"kind": "quark", "num_bins": 3, "kl_coef": 0.05, "entropy_coef": 0.0},
        "optimiser": {"lr": 3e-3, "batch_size": 16, "warmup_steps": 10, "max_grad_norm": 1.0},
        "checkpoint": {"every": 0},
        "evaluation": {"share": 0.1, "max_prompts": 40},
        "publish": {"name": ROUTE},
        "steps": steps,
        "num_threads": 1,  # the engine keeps the other core busy
    }


class Demo:
    """One run of the demonstration.

    Args:
        options: Parsed command line.
        console: Where it tells its story.
        work_dir: Database, logs and versions of this run.
    """

    def __init__(self, options: argparse.Namespace, console: Console, work_dir: Path) -> None:
        self._options = options
        self._console = console
        self._work_dir = work_dir
        self._started_s = time.monotonic()
        self._stage_s: dict[str, float] = {}
        self.is_serving = False

    def run(self) -> None:
        """All stages, top to bottom. Raises `TrimtabError`, `OSError` or `KeyboardInterrupt`; no child survives it."""
        if not is_port_free(_HOST, self._options.port):
            raise TrimtabError(f"port {self._options.port} of {_HOST} is taken; choose another with --port")
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with self._stage("models"):
            models = self._build_models()
        with running(lambda: self._start_server(models)) as server, Gateway(self._url) as gateway:
            with self._stage("engine"):
                self._wait_ready(server, gateway)
            with self._stage("rollouts"):
                self._log_rollouts(gateway)
            with self._stage("training"):
                version = self._train(gateway, models)
            with self._stage("swap"):
                swap = self._swap(gateway, version)
            with self._stage("evaluation"):
                prompts = world.prompts(_EVAL_SEED, self._options.prompts, "eval")
                rows = self._evaluate(gateway, prompts)
            self._show(prompts, rows, swap, version)
            self._say(f"total {time.monotonic() - self._started_s:.0f} s")
            if not self._options.exit:
                self._serve_on(server, prompts[0])

    @property
    def _url(self) -> str:
        return f"http://{_HOST}:{self._options.port}"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._console.rule(name, align="left")
        started = time.monotonic()
        yield
        self._stage_s[name] = time.monotonic() - started
        self._say(f"{name}: {self._stage_s[name]:.0f} s")

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)

    def _build_models(self) -> "DemoModels":
        from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - `--help` needs no torch

        from trimtab_training.demo import tiny_lm  # noqa: PLC0415

        transformers_logging.disable_progress_bar()
        models = tiny_lm.build(cache_dir=self._options.cache_dir, report=self._say)
        self._say(f"base LM in {models.base}, adapter LM in {models.adapter}")
        return models

    def _start_server(self, models: "DemoModels") -> Child:
        from trimtab_training.demo.tiny_lm import DemoSettings  # noqa: PLC0415

        command = serve_command(
            base=models.base,
            adapter=models.adapter,
            host=_HOST,
            port=self._options.port,
            data_dir=self._work_dir / "data",
            context=DemoSettings().context,
        )
        self._say(f"$ {shlex.join(command)}")
        return Child("trimtab serve", command, self._work_dir / "serve.log", environment=child_environment(os.environ))

    def _wait_ready(self, server: Child, gateway: Gateway) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        with self._console.status("waiting for the engine"):
            while not gateway.is_ready():
                server.check_alive()
                if time.monotonic() > deadline:
                    raise TrimtabError(
                        f"the engine was not ready after {_READY_TIMEOUT_S:.0f} s; its log ends with:\n"
                        f"{server.log_tail()}"
                    )
                time.sleep(0.25)

    def _log_rollouts(self, gateway: Gateway) -> None:
        prompts = world.prompts(_TRAIN_SEED, self._options.train_prompts)
        bodies = [{"model": BASE_MODEL, "prompt": p, "n": _CANDIDATES_PER_PROMPT, **SAMPLING} for p in prompts]
        with self._progress("prompts answered by the base", len(bodies)) as on_done:
            answers = gateway.complete(bodies, on_done=on_done)
        self._say(f"{sum(map(len, answers))} rollouts of {len(prompts)} training prompts are in the log")

    def _train(self, gateway: Gateway, models: "DemoModels") -> str:
        """Post a job, let a worker run it at low priority, and return the version that it published."""
        config = job_config(models, steps=self._options.steps)
        job_id = gateway.post_job(config, name="demonstration")
        command = trainer_command(url=self._url, output_dir=self._work_dir / "jobs")
        self._say(f"$ {shlex.join(command)}")
        log = self._work_dir / "trainer.log"
        environment = child_environment(os.environ)
        with (
            running(lambda: Child("trimtab trainer", command, log, environment=environment, nice=5)) as trainer,
            Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self._console) as bar,
        ):
            task = bar.add_task("queued", total=self._options.steps)
            while True:
                has_ended = trainer.returncode is not None
                job = gateway.job(job_id)
                bar.update(task, description=_describe(job), completed=job["progress"].get("step", 0))
                if job["state"] in ("succeeded", "failed", "cancelled"):
                    break
                if has_ended:
                    trainer.check_alive()
                time.sleep(0.5)
        if job["state"] != "succeeded" or not job["version"]:
            raise TrimtabError(f"the training job {job['state']}: {job['error']}; see {log}")
        self._say(f"version {job['version']} of the adapter {ROUTE} is published")
        return str(job["version"])

    def _swap(self, gateway: Gateway, version: str) -> SwapReport:
        prompt = world.prompts(_TRAIN_SEED, 1)[0]
        body = {"model": ROUTE, "prompt": prompt, "max_tokens": _STREAM_TOKENS, "ignore_eos": True}
        report = switch_under_streams(gateway, route=ROUTE, adapter=ROUTE, version=version, body=body)
        self._say(
            f"the route {ROUTE} went to version {version} in {report.switch_s:.2f} s: {report.num_spanning} streams "
            f"were under way, {report.num_kept} of them ended on the version they began with, {report.num_failed} "
            f"streams broke off, {report.num_on_new} later ones ran on the new version"
        )
        if not report.is_seamless:
            raise TrimtabError("a stream was disturbed by the switch, or none was under way; see serve.log")
        return report

    def _evaluate(self, gateway: Gateway, prompts: Sequence[str]) -> list[Figures]:
        rows = []
        for system in SYSTEMS:
            with self._progress(system.name, len(prompts)) as on_done:
                rows.append(measure(gateway, system, prompts, on_done=on_done))
        return rows

    def _show(self, prompts: Sequence[str], rows: Sequence[Figures], swap: SwapReport, version: str) -> None:
        self._console.print(samples_table(prompts, rows))
        self._console.print(figures_table(rows))
        for note in footnotes(rows):
            self._console.print(note, markup=False)
        if self._options.json is not None:
            result = {
                "systems": [row.to_json() for row in rows],
                "samples": [
                    {"prompt": prompt, "answers": {row.system.name: row.texts[i] for row in rows}}
                    for i, prompt in enumerate(itertools.islice(prompts, 3))
                ],
                "version": version,
                "swap": {"seconds": swap.switch_s, "spanning_streams": swap.num_spanning, "failed": swap.num_failed},
                "stages_s": self._stage_s,
                "total_s": time.monotonic() - self._started_s,
            }
            self._options.json.write_text(json.dumps(result, indent=2) + "\n")

    def _serve_on(self, server: Child, prompt: str) -> None:
        self.is_serving = True
        body = json.dumps({"model": ROUTE, "prompt": prompt, **SAMPLING})
        self._say(f"\nServing on {self._url} until Ctrl-C. Try the routes {ROUTE} and {BASE_MODEL}:\n")
        self._say(f"curl {self._url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}\n")
        server.wait()
        server.check_alive()


def _describe(job: dict[str, Any]) -> str:
    progress = job["progress"]
    figures = [f"{name} {progress[name]:.3f}" for name in ("loss", "kl", "mean_rollout_reward") if name in progress]
    return ", ".join([str(progress.get("phase", job["state"])), *figures])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
