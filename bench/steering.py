"""What steering costs per decoding step on CPU, beside the parts that it is made of and the ways it was done before.

    python bench/steering.py --json steering.json

All systems run in one process tree and take turns, round by round, so that a slow minute of the machine hits all of
them. Reported are medians over the rounds of each round's median step, with the smallest and the largest.

    base      the base model alone in stock vLLM             (a)
    adapter   the adapter LM alone in stock vLLM             (b)
    steered   base steered by one adapter LM, recorded       (c)
    steered2  base steered by two adapter LMs, recorded      (d)
    hf_loop   two Hugging Face models in a static batch      (e)
    per_row   a simple processor, one forward pass per row   (f)
    mixed     as many unsteered rows again in the batch; `mixed_base` is the base alone with as many rows
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import models
from harness.report import as_table, describe_machine
from harness.systems import System, Timing, Work, Worker

ONE = ((0, 1.0),)
TWO = ((0, 1.0), (1, -0.5))
SYSTEMS = ("base", "adapter", "steered", "steered2", "hf_loop", "per_row")


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    base = models.llama(models.parse_shape(options.base, models.BASE), seed=0)
    shape = models.parse_shape(options.adapter, models.ADAPTER)
    adapters = [models.version(models.llama(shape, seed=seed), f"a{seed}")[1] for seed in (1, 2)]
    wanted = [name for name in SYSTEMS if name not in options.without]
    with ExitStack() as stack:
        workers = {
            name: _started(stack, system)
            for name, system in _systems(base, adapters).items()
            if name in wanted or name in ("base", "steered")
        }
        workers["steered2"] = workers["steered"]
        rows = [
            _measure(workers, wanted, options, batch, prompt) for prompt in options.prompts for batch in options.batches
        ]
    result = {"machine": describe_machine(), "options": _plain(options), "rows": rows}
    _print(rows)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="layers x hidden of the base (default: 24x1024, 342 M)")
    parser.add_argument("--adapter", default="", help="layers x hidden of the adapter LM (default: 8x512, 42 M)")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16, 32])
    parser.add_argument("--prompts", type=_numbers, default=[64, 512], help="prompt lengths")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--no-record", action="store_true", help="steered rows keep no log-probabilities")
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help="systems to leave out")
    parser.add_argument("--mixed", action="store_true", help="also measure unsteered rows beside the steered ones")
    parser.add_argument("--json", type=Path)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def _systems(base: Path, adapters: list[Path]) -> dict[str, System]:
    both = tuple(adapters)
    return {
        "base": System("vllm", base, max_num_seqs=64),
        "adapter": System("vllm", adapters[0], kv_gib=1),
        "steered": System("steered", base, both, max_num_seqs=64),
        "hf_loop": System("hf_loop", base, both),
        "per_row": System("per_row", base, both),
    }


def _started(stack: ExitStack, system: System) -> Worker:
    worker = Worker(system)
    stack.callback(worker.stop)
    worker.wait_ready()  # one after the other: starting uses all cores
    return worker


def _measure(
    workers: dict[str, Worker], wanted: list[str], options: argparse.Namespace, batch: int, prompt: int
) -> dict[str, Any]:
    generator = random.Random(batch * 10_007 + prompt)
    prompts = tuple(tuple(generator.randrange(1, 32_000) for _ in range(prompt)) for _ in range(2 * batch))
    works = dict(_works(prompts, batch, options))
    timings: dict[str, list[Timing]] = {name: [] for name in works if name in wanted or name.startswith("mixed")}
    # The first round fills prefix caches and warms kernels up; it is not counted.
    for number in range(options.rounds + 1):
        for name, measured in timings.items():
            worker = workers[{"mixed": "steered", "mixed_base": "base"}.get(name, name)]
            timing = worker.run(works[name])
            if number:
                measured.append(timing)
    row: dict[str, Any] = {"batch": batch, "prompt": prompt}
    for name, measured in timings.items():
        steps = sorted(timing.step_ms for timing in measured)
        row[f"{name}_ms"] = statistics.median(steps)
        row[f"{name}_spread_ms"] = [steps[0], steps[-1]]
        row[f"{name}_tokens_per_s"] = len(works[name].prompts) * 1e3 / row[f"{name}_ms"]
        row[f"{name}_peak_gib"] = measured[-1].peak_bytes / (1 << 30)
    row |= _ratios(timings)
    print(f"batch {batch}, prompt {prompt}: {_line(row, timings)}", file=sys.stderr, flush=True)
    return row


def _works(prompts: tuple[tuple[int, ...], ...], batch: int, options: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    def work(num_rows: int, *steerings: tuple[tuple[int, float], ...]) -> Work:
        return Work(
            prompts[:num_rows],
            options.tokens,
            steerings,
            record=not options.no_record,
            temperature=options.temperature,
        )

    for name in ("base", "adapter", "hf_loop", "per_row"):
        yield name, work(batch)
    yield "steered", work(batch, *[ONE] * batch)
    yield "steered2", work(batch, *[TWO] * batch)
    if options.mixed:
        yield "mixed_base", work(2 * batch)
        yield "mixed", work(2 * batch, *[ONE] * batch, *[()] * batch)


def _ratios(timings: dict[str, list[Timing]]) -> dict[str, float]:
    """Ratios are formed within a round, where all systems saw the same machine, and then their median is taken."""
    rounds = [dict(zip(timings, parts, strict=True)) for parts in zip(*timings.values(), strict=True)]
    step = [{name: timing.step_ms for name, timing in parts.items()} for parts in rounds]
    ratios: dict[str, float] = {}
    if "adapter" in timings:
        ratios["added_to_adapter"] = statistics.median((s["steered"] - s["base"]) / s["adapter"] for s in step)
        if "steered2" in timings:
            ratios["added2_to_adapter"] = statistics.median((s["steered2"] - s["base"]) / s["adapter"] for s in step)
    if "hf_loop" in timings:
        ratios["speed_to_hf_loop"] = statistics.median(s["hf_loop"] / s["steered"] for s in step)
    if "mixed" in timings:
        ratios["added_mixed_to_added"] = statistics.median(
            (s["mixed"] - s["mixed_base"]) / (s["steered"] - s["base"]) for s in step
        )
    return ratios


def _line(row: dict[str, Any], timings: dict[str, list[Timing]]) -> str:
    parts = [f"{name} {row[f'{name}_ms']:.1f}" for name in timings]
    parts += [f"{key} {row[key]:.2f}" for key in row if "_to_" in key]
    return ", ".join(parts)


def _print(rows: list[dict[str, Any]]) -> None:
    names = [name for name in (*SYSTEMS, "mixed_base", "mixed") if f"{name}_ms" in rows[0]]
    ratios = [key for key in rows[0] if "_to_" in key]
    header = ["batch", "prompt", *(f"{name} ms" for name in names), *(key.replace("_", " ") for key in ratios)]
    body = [
        [
            str(row["batch"]),
            str(row["prompt"]),
            *(f"{row[f'{n}_ms']:.1f}" for n in names),
            *(f"{row[k]:.2f}" for k in ratios),
        ]
        for row in rows
    ]
    print(as_table(header, body))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
