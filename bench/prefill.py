"""Time to the first token of a steered request, beside the base's and the adapter LM's own.

    python bench/prefill.py --json prefill.json

`first_ratio` is steered / (base + adapter), all prefix caches cold. `candidates_ratio` is the time until all of eight
candidates of one prompt have their first token, against one candidate. The adapter LM must read the prompt once for
all of them: `candidates_computed` counts the tokens it computed per token of the prompt.
"""

import argparse
import json
import random
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import models
from harness.report import as_table, describe_machine
from harness.systems import System, Timing, Work, Worker

ONE = ((0, 1.0),)
CANDIDATES = 8


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[256, 1024, 3000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one engine step (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    base = models.llama(models.BASE, seed=0)
    adapter = models.version(models.llama(models.ADAPTER, seed=1), "a1")[1]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, system in {
            "base": System("vllm", base, max_num_batched_tokens=options.chunk),
            "adapter": System("vllm", adapter, kv_gib=1, max_num_batched_tokens=options.chunk),
            "steered": System("steered", base, (adapter,), max_num_batched_tokens=options.chunk),
        }.items():
            workers[name] = Worker(system)
            stack.callback(workers[name].stop)
            workers[name].wait_ready()
        rows = [_measure(workers, length, options.rounds) for length in options.prompts]
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(as_table(list(rows[0]), [[f"{value:.2f}" for value in row.values()] for row in rows]))
    return 0


def _measure(workers: dict[str, Worker], length: int, rounds: int) -> dict[str, Any]:
    generator = random.Random(length)
    times: dict[str, list[float]] = {"base": [], "adapter": [], "steered": [], "candidates": []}
    computed = 0.0
    for number in range(rounds + 1):
        prompt = tuple(generator.randrange(1, 32_000) for _ in range(length))  # new each time: no cache knows it
        other = tuple(generator.randrange(1, 32_000) for _ in range(length))
        works = {
            "base": Work((prompt,), 2, fresh=True),
            "adapter": Work((prompt,), 2, fresh=True),
            "steered": Work((prompt,), 2, (ONE,), fresh=True),
            "candidates": Work((other,) * CANDIDATES, 2, (ONE,) * CANDIDATES, fresh=True),
        }
        for name, work in works.items():
            timing = workers["steered" if name == "candidates" else name].run(work)
            if name == "steered":
                before = _computed(timing)
            elif name == "candidates":
                computed = (_computed(timing) - before) / length
            if number:
                times[name].append(timing.first_s)
    row = {"prompt": length, **{f"{name}_s": statistics.median(values) for name, values in times.items()}}
    row["first_ratio"] = statistics.median(
        steered / (base + adapter)
        for steered, base, adapter in zip(times["steered"], times["base"], times["adapter"], strict=True)
    )
    row["candidates_ratio"] = row["candidates_s"] / row["steered_s"]
    row["candidates_computed"] = computed
    print(row, file=sys.stderr, flush=True)
    return row


def _computed(timing: Timing) -> int:
    return int(timing.status["cache"]["computed_tokens"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
