"""A decoding step of many LoRAs on one shared LM, beside a step of one whole adapter LM: the adapter's part alone.

    python bench/lora.py --rows 16 --rounds 15

`step` is the time of a step against that of one whole version over the same rows, in the same round. `stack` is what
the first step after a LoRA came or went takes longer, in steps of one whole version. `weights` is memory against that
of one whole version.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harness import models
from harness.report import as_table, describe_machine
from trimtab_adapters.adapter_lm import Backend
from trimtab_adapters.contract.manifest import read_vocabulary, vocabulary_fingerprint
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.lora_lm import LoraLM
from trimtab_adapters.residents import BaseModel, Residents
from trimtab_adapters.steering import SteeredRow, SteeringCore
from trimtab_adapters.store import VersionStore
from trimtab_adapters.vllm.cpu_attention import CpuKernel
from trimtab_adapters.vllm.cpu_ops import CpuOps

SHAPE = models.ADAPTER
KINDS = {
    "q v, r 8": (("self_attn.q_proj", "self_attn.v_proj"), 8),
    "all linear, r 16": (
        (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ),
        16,
    ),
}


@dataclass
class Contender:
    """An engine's adapters with rows that decode."""

    name: str
    residents: Residents
    core: SteeringCore
    rows: list[SteeredRow]

    def step(self) -> float:
        """One token of every row, in seconds."""
        logits = torch.zeros(len(self.rows), SHAPE.vocab_size)
        started = time.perf_counter()
        result = self.core.step([(row, place) for place, row in enumerate(self.rows)], logits)
        elapsed = time.perf_counter() - started
        if result is None or result.failed:
            raise RuntimeError(f"{self.name}: {self.rows[0].error}")
        for row in self.rows:
            row.append([len(row.tokens) % 1000])
        return elapsed

    def forget_stacks(self) -> None:
        """As if a LoRA had come that is not in the stack."""
        for resident in self.residents.committed.values():
            if isinstance(resident.adapter, LoraLM):
                resident.adapter.stacks.discard(resident.adapter.layers)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps of each in a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--whole", type=lambda text: [int(n) for n in text.split(",")], default=[4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    trunk = models.llama(SHAPE, seed=1)
    contenders = [_whole(trunk, 1, options)]
    for kind in KINDS:
        contenders += [_loras(trunk, kind, count, options) for count in (1, 4, 16) if count <= options.rows]
    contenders += [_whole(trunk, count, options) for count in options.whole]
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    restacked: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(options.rounds + 1):
        for contender in contenders:
            contender.forget_stacks()
            first = contender.step()
            median = statistics.median(contender.step() for _ in range(options.steps))
            if number:  # the first round warms up
                times[contender.name].append(median)
                restacked[contender.name].append(first - median)
    rows = list(_ratios(contenders, times, restacked))
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    cells = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
    print(as_table(list(rows[0]), cells))
    return 0


def _ratios(
    contenders: list[Contender], times: dict[str, list[float]], restacked: dict[str, list[float]]
) -> Iterator[dict[str, Any]]:
    one = contenders[0]
    one_bytes = one.residents.weight_status().used_bytes
    for contender in contenders:
        pairs = list(zip(times[contender.name], restacked[contender.name], times[one.name], strict=True))
        yield {
            "adapters": contender.name,
            "step": statistics.median(mine / whole for mine, _, whole in pairs),
            "stack": statistics.median(extra / whole for _, extra, whole in pairs),
            "weights": contender.residents.weight_status().used_bytes / one_bytes,
        }


def _whole(trunk: Path, count: int, options: argparse.Namespace) -> Contender:
    paths = [models.version(trunk, f"whole-{number}")[1] for number in range(count)]
    return _contender(f"{count} whole", paths, options)


def _loras(trunk: Path, kind: str, count: int, options: argparse.Namespace) -> Contender:
    store = VersionStore(models.cache_dir() / "store")
    paths = []
    for number in range(count):
        directory = (
            models.cache_dir() / f"lora-{SHAPE.num_layers}x{SHAPE.hidden_size}-{'-'.join(kind.split())}-{number}"
        )
        if not (directory / "adapter_config.json").exists():
            _write_lora(directory, trunk, kind, seed=number)
        paths.append(store.add(directory, name=f"lora-{number}", trunk=trunk)[1])
    return _contender(f"{count} LoRA{'s' * (count > 1)}: {kind}", paths, options)


def _write_lora(directory: Path, trunk: Path, kind: str, *, seed: int) -> None:
    modules, rank = KINDS[kind]
    config = json.loads((trunk / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    widths = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            out, width = widths.get(module.split(".")[-1], (hidden, hidden))
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * width**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.02
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [m.split(".")[-1] for m in modules],
    }
    (directory / "adapter_config.json").write_text(json.dumps(content))


def _contender(name: str, paths: list[Path], options: argparse.Namespace) -> Contender:
    vocabulary = read_vocabulary(paths[0])
    base = BaseModel(SHAPE.vocab_size, len(vocabulary), vocabulary_fingerprint(vocabulary), SHAPE.max_length)
    residents = Residents(
        base, torch.device("cpu"), kv_bytes=1 << 29, dtype=torch.bfloat16, backend=Backend(CpuKernel(), CpuOps())
    )
    for path in paths:
        residents.prepare(path.name, str(path))
        while (status := residents.poll(path.name)).state == "loading":
            time.sleep(0.02)
        if status.state != "prepared":
            raise RuntimeError(f"{name}: {status.error}")
        residents.commit(path.name)
    core = SteeringCore(residents.committed, vocab_size=SHAPE.vocab_size)
    rows = []
    for number in range(options.rows):
        weight = AdapterWeight(name="a", version=paths[number % len(paths)].name, alpha=1.0)
        prompt = [1 + (31 * number + place) % 30_000 for place in range(options.prompt)]
        rows.append(core.open(SteeringParams(uid=f"r{number}", adapters=[weight]), prompt, []))
    print(f"{name} loaded", file=sys.stderr, flush=True)
    return Contender(name, residents, core, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
