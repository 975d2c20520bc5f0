"""A step of the steering core alone: adapter forward, mixing, recording; no engine, no base model.

    python bench/core.py --json core.json

Shows what the core itself costs and how that grows: with rows and with context as attention does, never with the number
of tokens sampled before. Cases take turns, round by round; medians of the rounds' medians, with smallest and largest.

    rows      1 to 32 rows, prompt 64
    context   16 rows, context 64 to 2048
    output    one row, the step after 16, 256 and 1024 sampled tokens; the context is the same length in all three
    operators 16 rows with a plausibility mask, a cap on KL, both, and with five alternatives to explain
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import models
from harness.report import as_table, describe_machine

Step = Callable[[], None]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="", help="layers x hidden of the adapter LM (default: 8x512, 42 M)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of each case in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    torch.set_num_threads(options.threads)
    directory = models.version(models.llama(models.parse_shape(options.adapter, models.ADAPTER), seed=1), "a1")[1]
    desk = _Desk(directory)
    cases = dict(desk.cases())
    rows = _measure(cases, options.rounds, options.steps)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    first = rows[0]["ms"]
    body = [
        [row["case"], f"{row['ms']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}", f"{row['ms'] / first:.2f}"]
        for row in rows
    ]
    print(as_table(["case", "ms per step", "spread", "to 1 row"], body))
    return 0


def _measure(cases: dict[str, Step], rounds: int, steps: int) -> list[dict[str, Any]]:
    medians: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, step in cases.items():
            times = []
            for _ in range(steps):
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
            if number:  # the first round warms caches and kernels up
                medians[name].append(statistics.median(times) * 1e3)
    return [
        {"case": name, "ms": statistics.median(values), "low": min(values), "high": max(values)}
        for name, values in medians.items()
    ]


class _Desk:
    """A core with one adapter LM and the rows of each case."""

    def __init__(self, directory: Path) -> None:
        import torch

        from trimtab_adapters.contract.manifest import read_manifest
        from trimtab_adapters.record_buffer import RecordBuffer
        from trimtab_adapters.residents import BaseModel, Residents
        from trimtab_adapters.steering import SteeringCore
        from trimtab_adapters.vllm.engine_config import backend_for

        device = torch.device("cpu")
        manifest = read_manifest(directory)
        self.version = manifest.version_id
        self.width = models.ADAPTER.vocab_size
        base = BaseModel(self.width, manifest.vocab_size, manifest.vocabulary_sha256, max_model_len=4000)
        residents = Residents(base, device, kv_bytes=2 << 30, backend=backend_for(device))
        residents.prepare(self.version, str(directory))
        while residents.poll(self.version).state == "loading":
            time.sleep(0.05)
        residents.commit(self.version)
        self.core = SteeringCore(residents.committed, vocab_size=self.width)
        self.records = RecordBuffer()
        self.random = random.Random(0)

    def cases(self) -> Sequence[tuple[str, Step]]:
        """Names and steps, in the order of the report."""
        found = [(f"{rows} rows, context 64", self.step(rows, 64)) for rows in (1, 4, 16, 32)]
        found += [(f"16 rows, context {context}", self.step(16, context)) for context in (512, 2048)]
        found += [(f"1 row, {out} of 1100 sampled", self.step(1, 1100 - out, out)) for out in (16, 256, 1024)]
        for name, more in (
            ("plausibility", {"operators": {"plausibility": 0.1}}),
            ("max_kl", {"operators": {"max_kl": 0.5}}),
            ("both", {"operators": {"plausibility": 0.1, "max_kl": 0.5}}),
            ("5 alternatives", {"num_alternatives": 5}),
        ):
            found.append((f"16 rows, {name}", self.step(16, 64, **more)))
        return found

    def step(self, num_rows: int, num_prompt: int, num_output: int = 0, **more: Any) -> Step:
        """A closure that samples one more token of each row, greedily, and goes back when it has gone 64 tokens far."""
        import torch

        from trimtab_adapters.contract.params import AdapterWeight, SteeringParams

        rows = []
        for _ in range(num_rows):
            uid = f"r{self.random.getrandbits(64)}"
            weights = [AdapterWeight(name="a", version=self.version, alpha=1.0)]
            params = SteeringParams(uid=uid, adapters=weights, record=True, **more)
            tokens = [self.random.randrange(1, self.width) for _ in range(num_prompt + num_output)]
            rows.append(self.core.open(params, tokens[:num_prompt], tokens[num_prompt:]))
        base = torch.randn(num_rows, self.width, generator=torch.Generator().manual_seed(0)) * 3
        places = [(row, index) for index, row in enumerate(rows)]
        limit = num_prompt + num_output + 64

        def take() -> None:
            logits = base.clone()
            result = self.core.step(places, logits)
            if result is None or result.failed:
                raise RuntimeError(f"a row failed: {result and result.failed[0][0].error}")
            sampled = logits.argmax(dim=-1)
            self.records.observe(result, sampled)
            for row, token in zip(rows, sampled.tolist(), strict=True):
                row.append([token])
                if len(row.tokens) >= limit:
                    del row.tokens[limit - 64 :]
                    self.records.take([row.params.uid])

        return torch.inference_mode()(take)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
