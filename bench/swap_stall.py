"""How long decoding stalls while adapter versions are loaded, committed and retired.

    python bench/swap_stall.py --json stall.json

Streams decode steadily, steered by a version that stays. In turns nothing else happens (`quiet`), or other versions are
loaded one after the other. A gap is the time from one token of a stream to its next; it is named by what happened in
it: `loading` (weights are read and checked in the background), `commit`, `retire`, or nothing. All gaps are given in
units of the median quiet gap of the same run.

The engine steps in this process, as its worker does in a server: loading shares its interpreter and its cores.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import models
from harness.report import as_table, describe_machine
from harness.systems import System, VllmRunner, Work

POLL_S = 0.02
"""As in `trimtab_adapters.vllm.endpoints`."""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    _set_environment(options.threads)
    base = models.llama(models.parse_shape(options.base, models.BASE), seed=0)
    shape = models.parse_shape(options.adapter, models.ADAPTER)
    directories = [
        models.version(models.llama(shape, seed=seed), f"a{seed}") for seed in range(1, options.versions + 2)
    ]
    system = System("steered", base, (directories[0][1],), max_num_seqs=64, num_threads=options.threads)
    bench = Stall(VllmRunner(system), options.streams)
    bench.warm_up()
    for _ in range(options.rounds):
        bench.quiet(options.steps)
        for manifest, directory in directories[1:]:
            bench.swap(manifest.version_id, directory, options.steps // 4)
    result = {"machine": describe_machine(), "options": _plain(options), **bench.report()}
    _print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="layers x hidden of the base (default: 24x1024, 342 M)")
    parser.add_argument("--adapter", default="", help="layers x hidden of the adapter LMs (default: 8x512, 42 M)")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--versions", type=int, default=4, help="versions that are loaded in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="quiet steps of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def _set_environment(num_threads: int) -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_NO_USAGE_STATS="1",
        TORCHDYNAMO_DISABLE="1",
        OMP_NUM_THREADS=str(num_threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_PLUGINS="",
        HF_HUB_OFFLINE="1",
    )


@dataclass
class Stall:
    """Streams that never end, and the gaps between their tokens.

    Attributes:
        runner: An engine with one version loaded, which steers all streams.
        num_streams: How many streams.
        gaps: Seconds, by what happened in the gap.
        load_s: Seconds from prepare to prepared.
    """

    runner: VllmRunner
    num_streams: int
    gaps: dict[str, list[float]] = field(default_factory=dict)
    load_s: list[float] = field(default_factory=list)
    _names: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))
    _last: float = 0.0

    def warm_up(self) -> None:
        """Fill the batch and let kernels choose their ways."""
        for _ in range(30):
            self._step("warm-up")
        self.gaps.clear()

    def quiet(self, num_steps: int) -> None:
        """Nothing but decoding."""
        for _ in range(num_steps):
            self._step("quiet")

    def swap(self, version: str, directory: Path, num_steps: int) -> None:
        """Load a version, commit it, retire it, with some steps after each."""
        self._last = time.perf_counter()
        started = time.perf_counter()
        state = self.runner.call("trimtab_prepare", version, str(directory))
        asked = time.perf_counter()
        while state["state"] == "loading":
            self._step("loading")
            if time.perf_counter() - asked >= POLL_S:
                state = self.runner.call("trimtab_poll", version)
                asked = time.perf_counter()
        if state["state"] != "prepared":
            raise RuntimeError(state["error"])
        self.load_s.append(time.perf_counter() - started)
        self.runner.call("trimtab_commit", version)
        self._step("commit")
        self.quiet(num_steps)
        self.runner.call("trimtab_retire", version)
        self._step("retire")
        self.quiet(num_steps)

    def report(self) -> dict[str, Any]:
        """Gaps in units of the median quiet one."""
        unit = statistics.median(self.gaps["quiet"])
        rows = {}
        for name, gaps in self.gaps.items():
            ordered = sorted(gap / unit for gap in gaps)
            rows[name] = {
                "gaps": len(ordered),
                "median": statistics.median(ordered),
                "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
                "max": ordered[-1],
            }
        return {"quiet_ms": unit * 1e3, "load_ms": statistics.median(self.load_s) * 1e3, "gaps": rows}

    def _step(self, name: str) -> None:
        self._fill()
        self.runner.engine.step()
        now = time.perf_counter()
        if self._filled:  # a prompt was read in it
            name = "prompt"
        if self._last and name != "prompt":
            self.gaps.setdefault(name, []).append(now - self._last)
        self._last = now

    def _fill(self) -> None:
        """Streams run to the end of the context; each that has ended is begun anew."""
        engine = self.runner.engine
        missing = self.num_streams - engine.get_num_unfinished_requests()
        self._filled = missing > 0
        for _ in range(missing):
            uid = f"s{next(self._names)}"
            work = Work(((5, 6, 7),), num_tokens=4000, record=False)
            engine.add_request(uid, {"prompt_token_ids": [5, 6, 7]}, self.runner.params(work, ((0, 1.0),), uid))


def _print(result: dict[str, Any]) -> None:
    print(f"median quiet gap {result['quiet_ms']:.1f} ms, loading takes {result['load_ms']:.0f} ms; in quiet medians:")
    header = ["in the gap", "gaps", "median", "p99", "max"]
    body = [
        [name, str(row["gaps"]), f"{row['median']:.2f}", f"{row['p99']:.2f}", f"{row['max']:.2f}"]
        for name, row in result["gaps"].items()
    ]
    print(as_table(header, body))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
