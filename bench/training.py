"""What a training run spends its time on: rollouts through the engine against transformers, and the way to a reward.

    python bench/training.py --json training.json

    rollouts   tokens/s of rollouts at --batch sequences at a time: through gateway and engine as a run draws them,
               against `generate` of transformers in static batches; the base alone, and steered by an adapter LM
    reward     seconds until the mean reward of a round has reached --target, rounds drawn by the engine or in the
               trainer's own process; peak memory of the trainer, and of gateway and engine

Systems take turns in one run. While transformers is measured, gateway and engine are stopped: an idle engine polls. The
reward is the sentiment of a story's continuation, by a lexicon.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from harness import models, services
from harness.completions import Completions
from harness.report import as_table, describe_machine
from harness.story_prompts import openings
from trimtab_adapters import mixing
from trimtab_training.config import SamplingConfig, parse_config
from trimtab_training.gateway import GatewayClient
from trimtab_training.models import load_vocabulary
from trimtab_training.padding import padded
from trimtab_training.prompts import Prompt
from trimtab_training.recipes.train import train
from trimtab_training.rollouts import GatewaySource, NamedVersion

PARTS: Final = ("rollouts", "reward")
REWARD: Final = "cheerful"


class Steering(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """The product of experts as the published code does it: a second model with its cache inside `generate`."""

    def __init__(self, adapter: Any, mask: torch.Tensor, num_known: int) -> None:
        self._adapter, self._mask, self._num_known = adapter, mask, num_known
        self._cache: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Steered logits `[B, V]`."""
        ids = input_ids if self._cache is None else input_ids[:, -1:]
        if self._cache is not None:
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(ids), 1)), dim=-1)
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._adapter(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        logprobs = mixing.adapter_logprobs(output.logits[:, -1], vocab_size=scores.shape[-1], num_known=self._num_known)
        return mixing.steer(scores.float(), [(1.0, logprobs)])


@dataclass
class Hf:
    """transformers' `generate` over static batches."""

    base: Any
    adapter: Any
    num_known: int
    batch: int
    max_tokens: int

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> int:
        """Tokens drawn, those behind an end not counted."""
        num_tokens = 0
        for start in range(0, len(prompts), self.batch):
            ids, mask = padded(prompts[start : start + self.batch], left=True, device=torch.device("cpu"))
            steering = [Steering(self.adapter, mask.long(), self.num_known)] if steered else []
            output = self.base.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.max_tokens,
                pad_token_id=0,
                logits_processor=LogitsProcessorList(steering),
            )[:, ids.shape[1] :]
            ends = (output == 0).long()  # token 0 ends a text
            num_tokens += int((ends.cumsum(dim=-1) - ends == 0).sum())
        return num_tokens


@dataclass
class Rounds:
    """What a training run told on the way."""

    began: float
    seconds: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def __call__(self, line: Mapping[str, float]) -> None:
        """A line of metrics."""
        if "rollouts/mean_reward" in line:
            self.seconds.append(time.perf_counter() - self.began)
            self.rewards.append(line["rollouts/mean_reward"])

    def reached(self, target: float) -> float | None:
        """Seconds until a round's mean reward was at least `target`."""
        return next((s for s, r in zip(self.seconds, self.rewards, strict=True) if r >= target), None)


def measure_rollouts(options: argparse.Namespace, client: GatewayClient, version: NamedVersion) -> dict[str, Any]:
    """Tokens per second of each system, by round."""
    vocabulary = load_vocabulary(options.base)
    texts = openings(options.data, options.prompts)
    sampling = SamplingConfig(max_tokens=options.max_tokens)

    @contextmanager
    def current() -> Iterator[NamedVersion]:
        yield version

    source = GatewaySource(client, model=services.MODEL, sampling=sampling, current_version=current)
    load = AutoModelForCausalLM.from_pretrained
    base, adapter = (load(path, dtype=getattr(torch, options.dtype)).eval() for path in (options.base, options.start))
    hf = Hf(base, adapter, vocabulary.num_tokens, options.batch, options.max_tokens)
    ids = [vocabulary.encode(text) for text in texts for _ in range(options.per_prompt)]

    def through_engine(seed: int, steered: bool) -> int:
        drawn = source.draw(
            [Prompt(text) for text in texts], num_per_prompt=options.per_prompt, seed=seed, steered=steered
        )
        return sum(len(sample.output_token_ids) for group in drawn for sample in group)

    def in_transformers(seed: int, steered: bool) -> int:
        torch.manual_seed(seed)
        with stopped_children():
            return hf.draw(ids, steered=steered)

    systems: dict[str, tuple[Callable[[int, bool], int], bool]] = {
        "engine": (through_engine, False),
        "transformers": (in_transformers, False),
        "engine, steered": (through_engine, True),
        "transformers, steered": (in_transformers, True),
    }
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(-1, options.rounds):  # the first one warms up
        for name, (draw, is_steered) in systems.items():
            began = time.perf_counter()
            num_tokens = draw(number + 1, is_steered)
            if number >= 0:
                rates[name].append(num_tokens / (time.perf_counter() - began))
    return {"tokens_per_s": rates, "num_outputs": len(ids)}


def measure_reward(options: argparse.Namespace, url: str, folder: Path) -> dict[str, Any]:
    """Seconds to a reward, with rounds from the engine and from this process."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings(options.data, 256, seed=1)))
    found: dict[str, Any] = {}
    for source in ("gateway", "local"):
        config = parse_config(
            {
                "output_dir": str(folder / source),
                "gateway": {"url": url},
                "models": {
                    "base_model": str(options.base),
                    "base_dtype": options.dtype,
                    "adapter": str(options.start),
                    "start_scale": 0.1,
                },
                "reward": {"name": REWARD, "source": "gateway", "transform": {"kind": "raw"}},
                "prompts": {"type": "file", "path": str(path)},
                "publish": {"name": "bench"},
                "logged": {"enabled": False},
                "objective": {"kind": "rloo", "kl_coef": 0.01},
                "fresh": {
                    "source": source,
                    "prompts_per_round": 32,
                    "num_per_prompt": 4,
                    **({"model": services.MODEL} if source == "gateway" else {}),
                },
                "sampling": {"max_tokens": options.max_tokens},
                "optimiser": {"batch_size": 64, "lr": 2e-3},
                "evaluation": {"share": 0.0},
                "report": {"plots": False},
                "steps": options.steps,
            }
        )
        rounds = Rounds(time.perf_counter())
        with GatewayClient(url, concurrency=options.batch // options.per_prompt) as client:
            train(config, gateway=client, listener=rounds, show_progress=False)
        found[source] = {
            "seconds_to_reward": rounds.reached(options.target),
            "seconds": rounds.seconds,
            "rewards": rounds.rewards,
        }
    return found


@contextmanager
def stopped_children() -> Iterator[None]:
    """Gateway and engine stand still for a while."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.suspend()
    try:
        yield
    finally:
        for child in children:
            child.resume()


def memory_gib() -> dict[str, float]:
    """Peak of this process; what gateway and engine hold now."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    served = sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 2**30
    return {"trainer_peak_gib": own, "gateway_and_engine_gib": served}


def main(argv: list[str]) -> int:
    options = _parse(argv)
    services.stop_on_sigterm()
    result: dict[str, Any] = {"machine": describe_machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    manifest, directory = models.version(options.start, "bench-adapter")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            services.engine(options.base, folder / "engine.log", dtype=options.dtype, nice=options.nice) as engine_url,
            services.gateway(
                engine_url, folder / "gateway", "--adapter", f"bench-adapter={directory}", "--rollouts", "off"
            ) as url,
            GatewayClient(url, concurrency=options.batch // options.per_prompt) as client,
            Completions(url) as admin,
        ):
            admin.post("/admin/rewards", {"name": REWARD, "kind": "sentiment"})
            if "rollouts" in options.parts:
                version = NamedVersion("bench-adapter", manifest.version_id, 1.0)
                result["rollouts"] = measure_rollouts(options, client, version)
                _print_rollouts(result["rollouts"]["tokens_per_s"])
            if "reward" in options.parts:
                result["reward"] = measure_reward(options, url, folder)
                result["memory"] = memory_gib()
                _print_reward(result["reward"], options.target)
                print(json.dumps({k: round(v, 2) for k, v in result["memory"].items()}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _print_rollouts(rates: Mapping[str, Sequence[float]]) -> None:
    rows = []
    for name, found in rates.items():
        other = rates["transformers, steered" if "steered" in name else "transformers"]
        ratios = [mine / theirs for mine, theirs in zip(found, other, strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(found):.0f}",
                f"{min(found):.0f} to {max(found):.0f}",
                f"{statistics.median(ratios):.2f}",
            ]
        )
    print("\n## rollouts\n")
    print(as_table(["system", "tokens/s, median", "range", "to transformers"], rows), flush=True)


def _print_reward(found: Mapping[str, Any], target: float) -> None:
    rows = []
    for source, told in found.items():
        reached = told["seconds_to_reward"]
        rewards = told["rewards"]
        rows.append(
            [
                source,
                "not reached" if reached is None else f"{reached:.0f}",
                f"{told['seconds'][-1]:.0f}",
                f"{rewards[0]:.3f}",
                f"{rewards[-1]:.3f}",
            ]
        )
    print("\n## reward\n")
    header = ["rounds drawn by", f"s until {target:g}", "s to the last round", "first mean reward", "last"]
    print(as_table(header, rows), flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=list(PARTS))
    parser.add_argument("--base", type=Path, default=Path("../shared/models/base7m"))
    parser.add_argument("--start", type=Path, default=Path("../shared/models/small2m"), help="of the adapter LM")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--dtype", default="float32", help="of the base, in engine and transformers")
    parser.add_argument("--nice", type=int, default=10, help="how much lower the engine's priority is")
    parser.add_argument("--batch", type=int, default=32, help="sequences at a time")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5, help="of the part `rollouts`")
    parser.add_argument("--steps", type=int, default=60, help="of the part `reward`")
    parser.add_argument("--target", type=float, default=0.7, help="mean reward of a round, of the part `reward`")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
