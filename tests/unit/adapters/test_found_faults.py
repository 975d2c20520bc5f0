"""Faults that were found by random schedules and by reading, each as small as it can be."""

import time
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from fault_desk import Desk, sample
from steering_reference import VOCAB_SIZE, Reference, base_description, load, params
from tiny_models import TinyModels
from trimtab_adapters.contract.params import XARGS_KEY
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvBudget, KvGeometry, KvPool, PoolExhaustedError, SequenceCache
from trimtab_adapters.record_buffer import RecordBuffer
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeringCore
from trimtab_adapters.vllm import processor_v1
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor

CPU = torch.device("cpu")
GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=1, head_dim=2, dtype=torch.float32)


@pytest.fixture
def desk(residents: Residents, reference: Reference, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(processor_v1, "build_residents", lambda config, device: residents)
    version = load(residents, tiny_models.adapter)
    return Desk(SteeringProcessor(None, CPU, False), reference, {version: "adapter"})


def version_of(desk: Desk) -> str:
    (version,) = desk.names
    return version


def explode(*_: object, **__: object) -> Any:
    raise RuntimeError("bug")


def test_a_request_that_arrives_in_a_failing_update_is_not_silently_unsteered(desk: Desk) -> None:
    desk.processor.before_step = explode
    desk.admit("lost", [1, 2], (version_of(desk), 1.0))
    desk.step()  # `lost` is steered exactly, or failed; Desk refuses anything else


def test_a_malformed_request_does_not_drop_those_behind_it(desk: Desk) -> None:
    malformed = desk.admit("malformed", [1, 2])
    malformed.sampling_params = SamplingParams(logprobs=0, extra_args={XARGS_KEY: "{"})
    desk.runner._builder.added[0] = (0, malformed.sampling_params, [1, 2], [])
    desk.admit("behind", [1, 2], (version_of(desk), 1.0))
    desk.step()  # `behind` is steered exactly, or failed; Desk refuses anything else


def test_a_record_buffer_that_always_fails_never_leaves_the_sampler(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.admit("lost", [1, 2], (version_of(desk), 1.0))
    desk.processor.update_state(desk.runner.take_update())
    monkeypatch.setattr(desk.processor.records, "observe", explode)
    sample(desk.processor, torch.zeros(1, VOCAB_SIZE))


def test_a_version_prepared_again_and_retired_again_is_kept_for_its_rows(desk: Desk) -> None:
    version, residents = version_of(desk), desk.processor.residents
    desk.admit("row", [1, 2], (version, 1.0))
    desk.step()
    assert residents.retire(version) == 1
    residents.prepare(version, "/nowhere")  # wanted again
    assert residents.retire(version) == 1, "its row is still there, so nothing was freed"


def test_a_prepared_version_that_is_retired_gives_its_pool_back(tiny_models: TinyModels, residents: Residents) -> None:
    version = tiny_models.manifest("adapter").version_id
    residents.prepare(version, str(tiny_models.adapter))
    while residents.poll(version).state == "loading":
        time.sleep(0.002)  # a loop without it starves the loading thread of the interpreter
    assert residents.budget.allocated_bytes > 0
    residents.retire(version)
    assert residents.budget.allocated_bytes == 0


def test_a_refused_pool_takes_nothing_from_the_budget() -> None:
    budget = KvBudget(GEOMETRY.block_bytes)
    with pytest.raises(PoolExhaustedError):
        KvPool(GEOMETRY, budget, CPU)
    assert budget.allocated_bytes == 0


def test_a_pool_whose_growth_ran_out_of_memory_grows_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = KvPool(GEOMETRY, KvBudget(16 * GEOMETRY.block_bytes), CPU, min_blocks=2)
    sequence, plain, calls = SequenceCache(root=b"v"), torch.zeros, iter(range(9))

    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        with pytest.raises(torch.OutOfMemoryError):
            pool.extend(sequence, list(range(3 * BLOCK_SIZE)))
    pool.extend(sequence, list(range(3 * BLOCK_SIZE)))
    assert pool.num_used == 3


def test_a_growth_that_ran_out_of_memory_loses_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = KvPool(GEOMETRY, KvBudget(16 * GEOMETRY.block_bytes), CPU, min_blocks=2)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_grow", explode)
        with pytest.raises(RuntimeError):
            pool.extend(SequenceCache(root=b"v"), list(range(3 * BLOCK_SIZE)))
    assert pool.num_used == 0


def test_steps_that_run_again_do_not_fill_the_record_buffer(desk: Desk) -> None:
    """Else the count only grows, and live records are dropped as if the buffer were full."""
    core, records = desk.processor.core, RecordBuffer()
    row = core.open(params("u", (version_of(desk), 1.0)), [1, 2], [])
    for _ in range(3):
        result = core.step([(row, 0)], torch.zeros(1, VOCAB_SIZE))
        assert result is not None
        records.observe(result, torch.tensor([1]))
    records.take(["u"])
    assert records._size == 0


def test_a_request_too_long_for_the_pool_fails_alone(tiny_models: TinyModels) -> None:
    block_bytes = 2 * 2 * 16 * 2 * 32 * 4
    small = Residents(base_description(tiny_models.base), CPU, kv_bytes=9 * block_bytes, dtype=torch.float32)
    core = SteeringCore(small.committed, vocab_size=VOCAB_SIZE)
    version = load(small, tiny_models.adapter)
    short, long = (core.open(params(uid, (version, 1.0)), [1] * n, []) for uid, n in (("s", 20), ("l", 150)))
    core.step([(short, 0), (long, 1)], torch.zeros(2, VOCAB_SIZE))
    assert long.error
    assert short.error is None


def test_a_prompt_that_was_read_ahead_gives_its_blocks_to_a_row_that_is_due(
    tiny_models: TinyModels, reference: Reference
) -> None:
    """Else the due row failed for want of blocks that its neighbour had taken for later."""
    block_bytes = 2 * 2 * 16 * 2 * 32 * 4
    small = Residents(base_description(tiny_models.base), CPU, kv_bytes=9 * block_bytes, dtype=torch.float32)
    core = SteeringCore(small.committed, vocab_size=VOCAB_SIZE)
    version = load(small, tiny_models.adapter)
    early = core.open(params("early", (version, 1.0)), [3] * 120, [])
    due = core.open(params("due", (version, 1.0)), [5] * 20, [])
    core.prefill([(early, 120)])
    assert len(early.terms[0].cache.blocks) == 8, "the whole pool"
    logits = torch.zeros(1, VOCAB_SIZE)
    core.step([(due, 0)], logits)
    assert due.error is None
    torch.testing.assert_close(logits[0], reference.logprobs("adapter", due.tokens), atol=1e-4, rtol=0.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    core.step([(early, 0)], logits)
    torch.testing.assert_close(logits[0], reference.logprobs("adapter", early.tokens), atol=1e-4, rtol=0.0)
