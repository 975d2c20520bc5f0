"""The V2 shell on a simulated V2 runner, each of whose rows is compared with the plain loop after every step."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from simulated_v2_runner import SampledRow, SimulatedV2Engine, SimulatedV2Runner
from steering_reference import VOCAB_SIZE, Reference, load, params
from tiny_models import TinyModels
from trimtab_adapters.residents import Residents
from trimtab_adapters.vllm import processor_v2
from trimtab_adapters.vllm.processor_v2 import SteeringProcessorV2
from trimtab_adapters.vllm.worker_extension import TrimtabWorkerExtension
from v2_kernels_on_cpu import replace_kernels

TOLERANCE = 1e-4
"""Sums of float32 log-probabilities in another order differ by a few 1e-6; a wrong token or position by whole nats."""
UNSTEERED = SamplingParams(temperature=0, logprobs=0)
Terms = Sequence[tuple[str, float]]


def config(**changes: Any) -> Any:
    """What the processor reads of vLLM's configuration."""
    values: dict[str, Any] = {
        "speculative_config": None,
        "model_config": SimpleNamespace(enable_prompt_embeds=False),
        "parallel_config": SimpleNamespace(enable_batch_sharded_sampling=False),
    }
    return SimpleNamespace(**(values | changes))


class V2Bench:
    """An engine with the recording sampler installed, whose rows are checked after every step."""

    def __init__(self, engine: SimulatedV2Engine, versions: Mapping[str, str], reference: Reference) -> None:
        self.engine, self.versions, self.reference = engine, versions, reference
        self.terms: dict[str, Terms] = {}

    @property
    def processor(self) -> SteeringProcessorV2:
        processor: SteeringProcessorV2 = self.engine.runner.processor
        return processor

    @property
    def num_held(self) -> int:
        """Rows that hold the version `adapter`."""
        return self.processor.residents.committed[self.versions["adapter"]].num_rows

    def sampling(self, name: str, terms: Terms, **changes: Any) -> SamplingParams:
        self.terms[name] = terms
        if not terms:
            return UNSTEERED
        steering = params(name, *((self.versions[model], alpha) for model, alpha in terms))
        return SamplingParams(**({"temperature": 0, "logprobs": 0} | changes), extra_args=dict(steering.to_xargs()))

    def add(self, name: str, num_prompt_tokens: int, terms: Terms = (("adapter", 1.0),), **changes: Any) -> None:
        prompt = [1 + (len(name) * 7 + 13 * place) % 127 for place in range(num_prompt_tokens)]
        self.engine.add(name, prompt, self.sampling(name, terms, **changes))

    def step(self, schedule: Mapping[str, int], **events: Any) -> list[SampledRow]:
        rows = self.engine.step(schedule, **events)
        self.check(rows)
        return rows

    def check(self, rows: Sequence[SampledRow]) -> None:
        for row in rows:
            terms = self.terms[row.name] if row.counts else ()
            if not terms:
                assert torch.equal(row.processed, row.base), f"{row.name} was touched"
                continue
            want = row.base.clone()
            for model, alpha in terms:
                want += alpha * self.reference.logprobs(model, row.tokens)
            assert float((row.processed - want).abs().max()) < TOLERANCE, row.name

    def logprob(self, row: SampledRow) -> float:
        """What the engine answers at the sampled token."""
        value: float = self.engine.last_output.logprobs_tensors.logprobs[row.index, 0].item()
        return value


def build_runner(residents: Residents, monkeypatch: pytest.MonkeyPatch) -> SimulatedV2Runner:
    replace_kernels(monkeypatch)
    monkeypatch.setattr(processor_v2, "build_residents", lambda config, device: residents)
    return SimulatedV2Runner(lambda states: SteeringProcessorV2(config(), states), vocab_size=VOCAB_SIZE)


def attach(runner: SimulatedV2Runner) -> TrimtabWorkerExtension:
    extension = TrimtabWorkerExtension()
    extension.model_runner = runner
    model_config = SimpleNamespace(served_model_name="base", max_model_len=256)
    extension.vllm_config = SimpleNamespace(use_v2_model_runner=True, model_config=model_config)
    assert extension.trimtab_attach()["runner"] == "v2"
    return extension


def make_bench(
    residents: Residents, tiny_models: TinyModels, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> V2Bench:
    """An attached engine of four slots with both tiny adapters loaded."""
    versions = {name: load(residents, getattr(tiny_models, name)) for name in ("adapter", "other")}
    runner = build_runner(residents, monkeypatch)
    attach(runner)
    return V2Bench(SimulatedV2Engine(runner), versions, reference)
