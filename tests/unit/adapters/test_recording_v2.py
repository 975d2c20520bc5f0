"""The sampler around vLLM's V2 sampler: what it returns, and when it is installed."""

from typing import Any

import pytest
import torch

from simulated_v2_runner import SimulatedV2Engine
from steering_reference import VOCAB_SIZE, Reference, load
from tiny_models import TinyModels
from trimtab_adapters.residents import Residents
from trimtab_adapters.vllm.recording_v2 import RecordingSamplerV2
from v2_bench import TOLERANCE, V2Bench, attach, build_runner, make_bench


@pytest.fixture
def bench(
    residents: Residents, tiny_models: TinyModels, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> V2Bench:
    return make_bench(residents, tiny_models, reference, monkeypatch)


@pytest.mark.parametrize("num_logprobs", [0, 3, -1])
@pytest.mark.parametrize("named", [None, [5, 9, 33, 40]])
def test_returned_logprobs_are_the_steered_ones(bench: V2Bench, num_logprobs: int, named: list[int] | None) -> None:
    bench.add("other one", 5, [("other", 1.5)], logprobs=num_logprobs)
    bench.add("plain", 5, [])
    bench.add("first", 7, logprobs=None if named else num_logprobs, logprob_token_ids=named)
    rows = bench.step({"other one": 5, "plain": 5, "first": 7}, arrive=["other one", "plain", "first"])
    tensors = bench.engine.last_output.logprobs_tensors
    for row in rows:
        want = torch.log_softmax(row.processed, -1)
        token_ids, values = tensors.logprob_token_ids[row.index].tolist(), tensors.logprobs[row.index].tolist()
        given = [ids for ids, value in zip(token_ids, values, strict=True) if value != -torch.inf]
        for token_id, value in zip(token_ids, values, strict=True):
            assert value == pytest.approx(float(want[token_id]), abs=TOLERANCE) or value == -torch.inf
        count = VOCAB_SIZE if num_logprobs == -1 else num_logprobs
        best = want.argsort(descending=True)[:count].tolist()
        assert given == [row.token_id, *(named if named and row.name == "first" else best)]
        assert int(tensors.selected_token_ranks[row.index]) == 1


def test_a_sample_that_is_not_the_likeliest_has_its_rank_among_the_steered(bench: V2Bench) -> None:
    bench.add("first", 7)
    sampler = bench.engine.runner.sampler._inner
    keep = sampler._sample_random

    def third_best(processed: Any, *arguments: Any) -> Any:
        _, logits = keep(processed, *arguments)
        return processed.argsort(dim=-1, descending=True)[:, 2], logits

    sampler._sample_random = third_best
    bench.step({"first": 7}, arrive=["first"])
    assert int(bench.engine.last_output.logprobs_tensors.selected_token_ranks[0]) == 3


def test_without_the_recording_sampler_steered_rows_fail(
    residents: Residents, tiny_models: TinyModels, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = load(residents, tiny_models.adapter)
    runner = build_runner(residents, monkeypatch)
    bench = V2Bench(SimulatedV2Engine(runner), {"adapter": version}, reference)
    bench.add("first", 4)
    bench.engine.step({"first": 4}, arrive=["first"])
    assert bench.processor.result is not None
    assert "not attached" in str(bench.processor.result.failed[0][0].error)
    attach(runner)
    bench.engine.step({"first": 1})
    assert bench.processor.result is not None, "it goes on failing rather than be sampled unsteered"


def test_attaching_twice_installs_one_sampler_and_other_samplers_are_refused(bench: V2Bench) -> None:
    runner = bench.engine.runner
    first = runner.sampler
    extension = attach(runner)
    assert runner.sampler is first
    assert isinstance(first, RecordingSamplerV2)
    for name, value in (("decode_query_len", 3), ("rejection_sampler", object()), ("batch_sharder", object())):
        usual = getattr(runner, name)
        setattr(runner, name, value)
        with pytest.raises(RuntimeError, match="one logits row per request"):
            extension.trimtab_attach()
        setattr(runner, name, usual)
    first._inner.logprobs_mode = "processed_logprobs"
    with pytest.raises(RuntimeError, match="raw_logprobs"):
        extension.trimtab_attach()
