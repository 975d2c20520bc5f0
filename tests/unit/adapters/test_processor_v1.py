"""The V1 shell under batch updates as vLLM's runner sends them."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.sampler import Sampler

from fault_desk import greedy_metadata
from steering_reference import VOCAB_SIZE, Reference, load, params
from tiny_models import TinyModels
from trimtab_adapters.contract.params import FAILED_LOGPROB, SteeringParams
from trimtab_adapters.residents import Residents
from trimtab_adapters.vllm import processor_v1
from trimtab_adapters.vllm.cpu_generators import replace_generators, rewound
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor
from trimtab_adapters.vllm.recording import RecordingSampler, _at


@pytest.fixture
def processor(residents: Residents, monkeypatch: pytest.MonkeyPatch) -> SteeringProcessor:
    monkeypatch.setattr(processor_v1, "build_residents", lambda config, device: residents)
    made = SteeringProcessor(None, torch.device("cpu"), False)
    made.discarded = lambda num_rows: np.zeros(num_rows, np.bool_)
    return made


def sampling(steering: SteeringParams | None) -> SamplingParams:
    return SamplingParams(logprobs=0, extra_args=dict(steering.to_xargs()) if steering else None)


def update(
    *, removed: tuple[int, ...] = (), added: tuple[Any, ...] = (), moved: tuple[Any, ...] = (), size: int = 4
) -> BatchUpdate:
    return BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved)


class Bench:
    """Requests by name in rows of a batch, each compared with the plain loop after every step."""

    def __init__(self, processor: SteeringProcessor, version: str, reference: Reference) -> None:
        self.processor, self.version, self.reference = processor, version, reference
        self.prompts: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.rows: list[str | None] = [None] * 4

    def added(self, index: int, name: str, *, steered: bool = True) -> tuple[Any, ...]:
        self.prompts.setdefault(name, [1 + len(name), *(ord(c) % 100 for c in name * 9)])
        self.outputs[name] = list(self.outputs.get(name, []))  # a fresh list, as after preemption
        self.rows[index] = name
        steering = params(name, (self.version, 1.0)) if steered else None
        return (index, sampling(steering), self.prompts[name], self.outputs[name])

    def step(self, batch_update: BatchUpdate | None, *, unsteered: frozenset[str] = frozenset()) -> None:
        self.processor.update_state(batch_update)
        base = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(len(str(self.outputs))))
        logits = self.processor.apply(base.clone())
        for index, name in enumerate(self.rows):
            want = base[index]
            if name is not None and name not in unsteered:
                tokens = self.prompts[name] + self.outputs[name]
                want = want + self.reference.logprobs("adapter", tokens)
            assert float((logits[index] - want).abs().max()) < 1e-4, (index, name)
        for name in {name for name in self.rows if name is not None}:
            self.outputs[name].append((3 * len(self.outputs[name]) + len(name)) % VOCAB_SIZE)


@pytest.fixture
def bench(processor: SteeringProcessor, tiny_models: TinyModels, reference: Reference) -> Bench:
    return Bench(processor, load(processor.residents, tiny_models.adapter), reference)


def held(bench: Bench) -> int:
    return bench.processor.residents.committed[bench.version].num_rows


def test_a_row_whose_index_is_refilled_is_let_go_without_being_removed(bench: Bench) -> None:
    bench.step(update(added=(bench.added(0, "first"), bench.added(1, "second"))))
    bench.step(None)
    bench.step(update(added=(bench.added(0, "third"),)))  # `removed` stays empty: the index was refilled
    assert held(bench) == 2


def test_condensing_moves_a_row_into_the_hole(bench: Bench) -> None:
    bench.step(update(added=(bench.added(0, "first"), bench.added(1, "second"), bench.added(2, "third"))))
    bench.rows[0], bench.rows[2] = "third", None
    bench.step(update(moved=((2, 0, MoveDirectionality.UNIDIRECTIONAL),)))
    bench.step(None)
    assert held(bench) == 2


def test_swapping_exchanges_two_rows(bench: Bench) -> None:
    rows = (bench.added(0, "first"), bench.added(1, "second"), bench.added(2, "x", steered=False))
    bench.step(update(added=rows), unsteered=frozenset("x"))
    bench.rows[0], bench.rows[1] = "second", "first"
    bench.step(update(moved=((0, 1, MoveDirectionality.SWAP),)), unsteered=frozenset("x"))
    bench.rows[1], bench.rows[2] = "x", "first"
    bench.step(update(moved=((1, 2, MoveDirectionality.SWAP),)), unsteered=frozenset("x"))
    assert held(bench) == 2


def test_a_preempted_row_comes_back_in_another_row_with_its_outputs(bench: Bench) -> None:
    bench.step(update(added=(bench.added(0, "first"), bench.added(1, "second"))))
    bench.step(None)
    bench.rows[1] = None
    bench.step(update(removed=(1,)))
    assert held(bench) == 1
    bench.step(update(added=(bench.added(3, "second"),)))
    bench.step(None)
    assert held(bench) == 2


def test_a_step_with_removals_and_no_apply_loses_nothing(bench: Bench) -> None:
    bench.step(update(added=(bench.added(0, "first"),)))
    bench.processor.update_state(update(removed=(0,), size=0))
    assert held(bench) == 0


def test_a_row_in_chunked_prefill_is_left_alone_until_its_sample_counts(bench: Bench) -> None:
    bench.processor.discarded = lambda num_rows: np.array([True, False, False, False])
    bench.step(update(added=(bench.added(0, "first"), bench.added(1, "second"))), unsteered=frozenset(["first"]))
    bench.outputs["first"].clear()
    bench.processor.discarded = lambda num_rows: np.zeros(4, np.bool_)
    bench.step(None)


def test_unsteered_rows_cost_nothing_and_stay_bit_for_bit(bench: Bench) -> None:
    zero = params("zero", (bench.version, 0.0))
    bench.processor.update_state(
        update(added=((0, sampling(None), [1, 2], []), (1, sampling(zero), [1, 2], [])), size=2)
    )
    base = torch.randn(2, VOCAB_SIZE)
    assert torch.equal(bench.processor.apply(base.clone()), base)
    assert bench.processor.core.num_steps == 0


def test_without_the_recording_sampler_steered_rows_fail(bench: Bench) -> None:
    bench.processor.discarded = None
    bench.processor.update_state(update(added=(bench.added(0, "first"),), size=1))
    bench.processor.apply(torch.zeros(1, VOCAB_SIZE))
    result = bench.processor.result
    assert result is not None
    assert "not attached" in str(result.failed[0][0].error)


@pytest.mark.parametrize("method", ["_update", "_rows"])
def test_an_internal_error_never_leaves_the_processor(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step(update(added=(bench.added(0, "first"),)))

    def explode(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(bench.processor, method, explode)
    bench.processor.update_state(update())
    base = torch.randn(4, VOCAB_SIZE)
    assert torch.equal(bench.processor.apply(base.clone()), base)
    assert bench.processor.result is not None
    ((row, _),) = bench.processor.result.failed
    assert "internal error" in str(row.error)


def test_the_adapter_reads_a_long_prompt_as_far_as_the_base_has(bench: Bench) -> None:
    prompt = [1 + number % 50 for number in range(100)]
    bench.processor.discarded = lambda num_rows: np.array([True])
    bench.processor.computed = lambda num_rows: [32]
    steered = sampling(params("long", (bench.version, 1.0)))
    bench.processor.update_state(update(added=((0, steered, prompt, []),), size=1))
    base = torch.randn(1, VOCAB_SIZE)
    assert torch.equal(bench.processor.apply(base.clone()), base)
    pool = bench.processor.residents.committed[bench.version].pool
    assert pool.counters.computed_tokens == 32
    bench.processor.computed = lambda num_rows: [64]
    bench.processor.update_state(None)
    bench.processor.apply(base.clone())
    assert pool.counters.computed_tokens == 64
    bench.processor.discarded = lambda num_rows: np.array([False])
    bench.processor.update_state(None)
    bench.processor.apply(base.clone())
    assert pool.counters.computed_tokens == 100


def test_parameters_are_checked_in_the_front_end(tiny_models: TinyModels) -> None:
    version = tiny_models.manifest("adapter").version_id
    SteeringProcessor.validate_params(sampling(params("u", (version, 1.0))))
    SteeringProcessor.validate_params(SamplingParams())
    with pytest.raises(ValueError, match="logprobs"):
        SteeringProcessor.validate_params(SamplingParams(extra_args=dict(params("u", (version, 1.0)).to_xargs())))
    for text in ("{", '{"uid":"u","adapters":[{"name":"a","version":"x","alpha":1}]}', "NaN", "[]"):
        with pytest.raises(ValueError, match="not a valid steering"):
            SteeringProcessor.validate_params(SamplingParams(extra_args={"trimtab": text}))


def sample_with(
    processor: SteeringProcessor, logits: Tensor, *, num_logprobs: int, token_ids: dict[int, list[int]] | None = None
) -> SamplerOutput:
    """Run vLLM's own sampler, greedy, inside the recording one."""
    metadata = greedy_metadata(processor, num_logprobs=num_logprobs, token_ids=token_ids)
    sampler = RecordingSampler(Sampler(), processor)
    return sampler(logits=logits, sampling_metadata=copy.copy(metadata))


@pytest.mark.parametrize(("num_logprobs", "token_ids"), [(0, None), (3, None), (-1, None), (0, {0: [5, 9], 1: [5]})])
def test_returned_logprobs_are_the_steered_ones_before_temperature(
    bench: Bench, num_logprobs: int, token_ids: dict[int, list[int]] | None
) -> None:
    bench.processor.update_state(update(added=(bench.added(0, "first"), (1, sampling(None), [1, 2], [])), size=2))
    base = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(5)) * 3
    output = sample_with(bench.processor, base.clone(), num_logprobs=num_logprobs, token_ids=token_ids)
    steered = torch.log_softmax(base[0] + bench.reference.logprobs("adapter", bench.prompts["first"]), -1)
    plain = torch.log_softmax(base[1], -1)
    assert output.sampled_token_ids[:, 0].tolist() == [int(steered.argmax()), int(plain.argmax())]
    tensors = output.logprobs_tensors
    assert isinstance(tensors, LogprobsTensors)
    if num_logprobs == -1:
        torch.testing.assert_close(tensors.logprobs, torch.stack((steered, plain)), atol=1e-4, rtol=0)
        return
    for row, want in enumerate((steered, plain)):
        for ids, value in zip(tensors.logprob_token_ids[row].tolist(), tensors.logprobs[row].tolist(), strict=True):
            assert value == pytest.approx(float(want[ids]), abs=1e-4) or value == float("-inf")
    assert tensors.selected_token_ranks.tolist() == [1, 1]


def test_a_steered_row_that_was_not_steered_in_a_step_is_reported_as_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.processor.update_state(update(added=(bench.added(0, "first"), (1, sampling(None), [1, 2], [])), size=2))
    monkeypatch.setattr(bench.processor, "apply", lambda logits: logits)
    logits = torch.randn(2, VOCAB_SIZE)
    output = sample_with(bench.processor, logits.clone(), num_logprobs=0)
    assert output.logprobs_tensors is not None
    assert float(output.logprobs_tensors.logprobs[0, 0]) == FAILED_LOGPROB
    want = float(torch.log_softmax(logits[1], -1).max())
    assert float(output.logprobs_tensors.logprobs[1, 0]) == pytest.approx(want, abs=1e-5)


def test_ranks_of_sampled_tokens_are_vllms() -> None:
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    logprobs = torch.log_softmax(torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)), -1)
    column = torch.randint(0, 1000, (300, 1), generator=torch.Generator().manual_seed(2))
    values, ranks = _at(logprobs, column)
    assert torch.equal(values, logprobs.gather(1, column))
    assert torch.equal(ranks, batched_count_greater_than(logprobs, values))


def test_a_thrown_away_sample_leaves_the_generator_where_it_was() -> None:
    plain = torch.Generator().manual_seed(3)
    state = SimpleNamespace(generator=plain)
    runner = SimpleNamespace(
        requests={"r": state}, input_batch=SimpleNamespace(generators={1: plain}, req_ids=["q", "r"])
    )
    replace_generators(runner)
    generator = runner.input_batch.generators[1]
    assert generator is state.generator
    replace_generators(runner)
    assert runner.input_batch.generators[1] is generator, "replaced once only"
    with rewound({1: generator}, np.array([False, True])):
        torch.rand(4, generator=generator)
    generator.set_offset(generator.get_offset() - 4)  # what vLLM does; a plain CPU generator raises
    with rewound({1: generator}, np.array([False, False])):
        drawn = torch.rand(4, generator=generator)
    want = torch.Generator().manual_seed(3)
    assert torch.equal(drawn, torch.rand(4, generator=want))
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=want))


def test_a_failed_row_is_marked_at_its_token_and_its_neighbours_are_not(bench: Bench) -> None:
    unknown = params("lost", ("f" * 16, 1.0))
    bench.processor.update_state(update(added=((0, sampling(unknown), [1], []), bench.added(1, "first")), size=2))
    output = sample_with(bench.processor, torch.randn(2, VOCAB_SIZE), num_logprobs=2)
    assert output.logprobs_tensors is not None
    assert output.logprobs_tensors.logprobs[0].tolist() == [FAILED_LOGPROB] * 3
    assert float(output.logprobs_tensors.logprobs[1].min()) > FAILED_LOGPROB
    (record,) = bench.processor.records.take(["lost"])
    assert record.status == "failed"
    assert "not loaded" in str(record.error)


def test_an_error_while_recording_fails_the_rows_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.processor.update_state(update(added=(bench.added(0, "first"), (1, sampling(None), [1], [])), size=2))

    def explode(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(bench.processor.records, "_measure", explode)
    output = sample_with(bench.processor, torch.randn(2, VOCAB_SIZE), num_logprobs=0)
    assert output.logprobs_tensors is not None
    assert float(output.logprobs_tensors.logprobs[0, 0]) == FAILED_LOGPROB
    assert float(output.logprobs_tensors.logprobs[1, 0]) > FAILED_LOGPROB
    (record,) = bench.processor.records.take(["first"])
    assert record.status == "failed"
