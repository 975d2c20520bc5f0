"""The V2 shell under vLLM's own V2 host code: slots, rows, tokens and failures."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override
from vllm import SamplingParams

from steering_reference import VOCAB_SIZE, Reference, params
from tiny_models import TinyModels
from trimtab_adapters.contract.params import FAILED_LOGPROB
from trimtab_adapters.residents import Residents
from trimtab_adapters.vllm.processor_v2 import SteeringProcessorV2
from v2_bench import TOLERANCE, V2Bench, config, make_bench


@pytest.fixture
def bench(
    residents: Residents, tiny_models: TinyModels, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> V2Bench:
    return make_bench(residents, tiny_models, reference, monkeypatch)


def test_rows_are_steered_while_their_order_changes(bench: V2Bench) -> None:
    bench.add("long", 30, [("adapter", 1.0), ("other", -0.5)])
    bench.add("short", 9, [("other", 2.0)])
    bench.add("plain", 5, [])
    bench.step({"long": 30}, arrive=["long"])
    rows = bench.step({"long": 1, "short": 4, "plain": 3}, arrive=["short", "plain"])
    assert [row.name for row in rows] == ["long", "plain", "short"]
    rows = bench.step({"short": 5, "plain": 2, "long": 1})
    assert [row.name for row in rows] == ["long", "plain", "short"]
    rows = bench.step({"short": 1, "long": 1, "plain": 1})
    assert [row.name for row in rows] == ["short", "long", "plain"], "decoding rows keep the scheduler's order"


def test_a_row_in_chunked_prefill_is_left_alone_until_its_sample_counts(bench: V2Bench) -> None:
    bench.add("first", 20)
    for count in (7, 6, 6):
        (row,) = bench.step({"first": count}, arrive=["first"] if count == 7 else [])
        assert not row.counts
        assert bench.processor.result is None
    (row,) = bench.step({"first": 1})
    assert row.counts
    bench.step({"first": 1})
    (record,) = bench.processor.records.take(["first"])
    assert (record.status, record.num_tokens) == ("ok", 2)


def test_the_adapter_reads_a_long_prompt_chunk_by_chunk_as_the_base_does(bench: V2Bench) -> None:
    bench.add("first", 40)
    bench.add("second", 9)
    counters = bench.processor.residents.committed[bench.versions["adapter"]].pool.counters
    computed = []
    for schedule, arrive in (
        ({"first": 15}, ["first"]),
        ({"first": 1}, []),  # one token more, which is the one that the row was fed
        ({"first": 16, "second": 9}, ["second"]),
        ({"first": 8, "second": 1}, []),
        ({"first": 1, "second": 1}, []),
    ):
        bench.step(schedule, arrive=arrive)
        computed.append(counters.computed_tokens)
    assert computed == [15, 16, 41, 50, 52]
    assert counters.recomputed_tokens == 0


def test_a_recycled_slot_closes_the_row_that_was_in_it(bench: V2Bench) -> None:
    """Also without the runner's table: `add_request` alone has to be enough."""
    bench.processor.is_occupied = lambda slot: True
    bench.add("first", 4)
    bench.add("second", 6)
    bench.add("plain", 3, [])
    bench.step({"first": 4}, arrive=["first"])
    slot = bench.engine.slot("first")
    bench.step({"second": 6}, arrive=["second"], finish=["first"])
    assert bench.engine.slot("second") == slot
    assert bench.num_held == 1
    bench.step({"plain": 3}, arrive=["plain"], finish=["second"])
    assert bench.engine.slot("plain") == slot
    assert bench.num_held == 0


def test_a_departed_request_is_let_go_in_a_step_without_tokens_and_its_version_is_freed(bench: V2Bench) -> None:
    bench.add("first", 20)
    bench.step({"first": 20}, arrive=["first"])
    residents, version = bench.processor.residents, bench.versions["adapter"]
    pool = residents.committed[version].pool
    assert (pool.num_used, residents.retire(version)) == (2, 1)
    assert bench.step({}, finish=["first"]) == []
    assert pool.num_used == 0
    assert version not in {loaded.version for loaded in residents.versions()}


def test_a_retired_version_serves_its_requests_to_the_end(bench: V2Bench) -> None:
    bench.add("first", 20)
    bench.step({"first": 8}, arrive=["first"])  # not sampled yet, but admitted
    assert bench.processor.residents.retire(bench.versions["adapter"]) == 1
    bench.step({"first": 12})
    bench.step({"first": 1})


def test_a_preempted_request_goes_on_in_another_slot(bench: V2Bench) -> None:
    for name, count in (("first", 25), ("second", 6), ("third", 4)):
        bench.add(name, count)
    bench.step({"first": 25, "second": 6}, arrive=["first", "second"])
    bench.step({"first": 1, "second": 1})
    slot = bench.engine.slot("first")
    bench.step({"second": 1}, preempt=["first"])
    assert bench.num_held == 1, "the preempted row holds nothing"
    bench.step({"second": 1, "third": 4}, arrive=["third"])
    assert bench.engine.slot("third") == slot
    rows = bench.step({"second": 1, "third": 1, "first": 26}, arrive=["first"])  # the prompt and one of two outputs
    assert bench.engine.slot("first") != slot
    assert [(row.name, row.counts) for row in rows] == [("second", True), ("third", True), ("first", False)]
    bench.step({"second": 1, "third": 1, "first": 1})
    bench.step({"second": 1, "third": 1, "first": 1})
    (record,) = bench.processor.records.take(["first"])
    assert (record.status, record.num_tokens) == ("ok", 4)
    assert record.token_ids == bench.engine.requests["first"].outputs


def test_a_request_that_is_preempted_and_back_in_one_step_is_read_anew(bench: V2Bench) -> None:
    bench.add("first", 10)
    bench.step({"first": 10}, arrive=["first"])
    bench.step({"first": 11}, preempt=["first"], arrive=["first"])
    assert bench.num_held == 1


def test_a_resume_that_lost_its_newest_token_goes_on_from_what_the_runner_has(bench: V2Bench) -> None:
    """Asynchronous scheduling throws a sample away that is under way when its request is preempted."""
    bench.add("first", 10)
    bench.step({"first": 10}, arrive=["first"])
    bench.step({"first": 1})
    bench.step({}, preempt=["first"])
    bench.engine.requests["first"].outputs.pop()
    bench.step({"first": 11}, arrive=["first"])
    bench.step({"first": 1})
    (record,) = bench.processor.records.take(["first"])
    assert (record.status, record.num_tokens) == ("ok", 3)


def test_a_step_that_steers_nothing_reports_nothing(bench: V2Bench) -> None:
    """The processor is not even called; the step before must not be reported a second time."""
    bench.add("steered", 4)
    bench.add("plain", 4, [])
    bench.step({"steered": 4}, arrive=["steered"])
    (row,) = bench.step({"plain": 4}, arrive=["plain"])
    assert bench.logprob(row) == pytest.approx(float(torch.log_softmax(row.base, -1).max()), abs=TOLERANCE)
    (record,) = bench.processor.records.take(["steered"])
    assert (record.num_tokens, record.token_ids) == (1, bench.engine.requests["steered"].outputs)


def test_a_request_that_is_not_scheduled_keeps_its_row(bench: V2Bench) -> None:
    bench.add("first", 8)
    bench.add("second", 8)
    bench.step({"first": 8, "second": 8}, arrive=["first", "second"])
    bench.step({"second": 1})
    bench.step({"second": 1, "first": 1})
    assert bench.num_held == 2


def test_warm_up_and_zero_weights_are_declined(bench: V2Bench) -> None:
    processor = bench.processor
    assert processor.add_request(0, SamplingParams.for_sampler_warmup()) is False
    zero = params("zero", (bench.versions["adapter"], 0.0))
    assert processor.add_request(1, SamplingParams(extra_args=dict(zero.to_xargs()))) is False
    bench.add("zero", 4, [])
    bench.step({"zero": 4}, arrive=["zero"])
    assert processor.core.num_steps == 0


def test_apply_for_rows_none_of_which_is_steered_changes_nothing(
    bench: V2Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called when a request wants another processor, here because of its temperature."""
    bench.add("steered", 4)
    bench.add("plain", 4, [])
    bench.engine.requests["plain"].sampling_params = SamplingParams(top_k=VOCAB_SIZE - 1)
    bench.step({"steered": 4}, arrive=["steered"])
    calls: list[object] = []
    apply = bench.processor.apply

    def counted(logits: Tensor, ctx: Any) -> Tensor:
        calls.append(ctx)
        before = logits.clone()
        assert torch.equal(apply(logits, ctx), before)
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(bench.processor, "apply", counted)
        bench.engine.step({"plain": 4}, arrive=["plain"])
    assert len(calls) == 1
    assert bench.processor.result is None
    bench.step({"steered": 1})


def test_grammar_masks_stay(bench: V2Bench) -> None:
    bench.add("first", 6)
    (row,) = bench.engine.step({"first": 6}, arrive=["first"], allowed={"first": [5, 9, 33]})
    assert torch.isfinite(row.processed).nonzero()[:, 0].tolist() == [5, 9, 33]
    want = row.base + bench.reference.logprobs("adapter", row.tokens)
    torch.testing.assert_close(row.processed[[5, 9, 33]], want[[5, 9, 33]], atol=TOLERANCE, rtol=0)
    assert bench.logprob(row) == pytest.approx(float(torch.log_softmax(want[[5, 9, 33]], -1).max()), abs=TOLERANCE)


class CountTokenCopies(TorchFunctionMode):
    """Counts copies of token ids to the host; only they are 32-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        host_copies = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.__int__)
        if func in host_copies and args[0].dtype == torch.int32:
            self.num_copies += 1
        return func(*args, **(kwargs or {}))


def test_a_step_copies_token_ids_to_the_host_once(bench: V2Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("first", 12), ("second", 30), ("third", 1)):
        bench.add(name, count)
    counts: list[int] = []
    apply = bench.processor.apply

    def counted(logits: Tensor, ctx: Any) -> Tensor:
        with CountTokenCopies() as mode:
            result: Tensor = apply(logits, ctx)
        counts.append(mode.num_copies)
        return result

    monkeypatch.setattr(bench.processor, "apply", counted)
    bench.step({"first": 12}, arrive=["first"])
    bench.step({"first": 1, "second": 20, "third": 1}, arrive=["second", "third"])
    bench.step({"second": 5})
    bench.step({"first": 1, "second": 5, "third": 1})
    assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize("text", ["{", "[]", '{"uid":"u","adapters":[{"name":"a","version":"x","alpha":1}]}', 5])
def test_parameters_that_cannot_be_read_fail_their_row_and_no_other(bench: V2Bench, text: object) -> None:
    bench.add("good", 4)
    bench.engine.add("bad", [1, 2, 3], SamplingParams(temperature=0, logprobs=0, extra_args={"trimtab": text}))
    rows = {row.name: row for row in bench.engine.step({"good": 4, "bad": 3}, arrive=["good", "bad"])}
    bench.check([rows["good"]])
    assert torch.equal(rows["bad"].processed, rows["bad"].base)
    assert bench.logprob(rows["bad"]) == FAILED_LOGPROB
    assert bench.logprob(rows["good"]) > FAILED_LOGPROB
    (record,) = bench.processor.records.take(["unreadable"])
    assert record.status == "failed"


def test_an_unknown_version_fails_its_row(bench: V2Bench) -> None:
    steering = params("lost", ("f" * 16, 1.0))
    sampling = SamplingParams(temperature=0, logprobs=2, extra_args=dict(steering.to_xargs()))
    bench.engine.add("lost", [1, 2], sampling)
    (row,) = bench.engine.step({"lost": 2}, arrive=["lost"])
    assert bench.engine.last_output.logprobs_tensors.logprobs[row.index].tolist() == [FAILED_LOGPROB] * 3
    (record,) = bench.processor.records.take(["lost"])
    assert "not loaded" in str(record.error)


@pytest.mark.parametrize("place", ["_open", "_scheduled", "_read_tokens", "core.step", "records.observe", "_close"])
def test_an_internal_error_fails_the_row_and_never_leaves_the_processor(
    bench: V2Bench, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = bench.processor, place
    if "." in place:
        part, name = place.split(".")
        owner = getattr(bench.processor, part)
    original, calls = getattr(owner, name), []

    def explode_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("bug")
        return original(*arguments)

    monkeypatch.setattr(owner, name, explode_once)
    bench.add("first", 4)
    (row,) = bench.engine.step({"first": 4}, arrive=["first"])
    assert bench.logprob(row) == FAILED_LOGPROB
    monkeypatch.undo()


def test_an_error_while_closing_is_tried_again(bench: V2Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("first", 4)
    bench.step({"first": 4}, arrive=["first"])
    with monkeypatch.context() as patch:
        patch.setattr(bench.processor, "_close", lambda slot: 1 // 0)
        bench.step({}, finish=["first"])
        assert bench.num_held == 1
    bench.step({})
    assert bench.num_held == 0


@pytest.mark.parametrize(("num_back", "is_steered"), [(1, True), (2, False)])
def test_a_step_may_be_repeated_but_not_undone(bench: V2Bench, num_back: int, is_steered: bool) -> None:
    """Which no V2 runner without speculative decoding does; a row that meets it must not be steered by wrong tokens."""
    bench.add("first", 4)
    bench.step({"first": 4}, arrive=["first"])
    bench.step({"first": 1})
    bench.step({"first": 1})
    request = bench.engine.requests["first"]
    request.num_computed -= num_back
    del request.outputs[-num_back:]
    states, slot = bench.engine.runner.req_states, bench.engine.slot("first")
    states.num_computed_tokens.gpu[slot] -= num_back
    states.total_len.gpu[slot] -= num_back
    states.last_sampled_tokens[slot] = request.outputs[-1]
    (row,) = bench.engine.step({"first": 1})
    assert (bench.logprob(row) > FAILED_LOGPROB) == is_steered
    if is_steered:
        bench.check([row])


def test_draft_rows_fail_each(bench: V2Bench) -> None:
    bench.add("first", 4)
    bench.step({"first": 4}, arrive=["first"])
    slot = bench.engine.slot("first")
    ctx = SimpleNamespace(
        idx_mapping_np=torch.tensor([slot]).numpy(),
        expanded_idx_mapping=torch.tensor([slot, slot, slot]),
        seq_lens_upper_bound_np=torch.tensor([5]).numpy(),
        input_ids=torch.tensor([7, 8, 9], dtype=torch.int32),
    )
    base = torch.randn(3, VOCAB_SIZE)
    assert torch.equal(bench.processor.apply(base.clone(), ctx), base)
    assert bench.processor.result is not None
    assert [index for _, index in bench.processor.result.failed] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"model_config": SimpleNamespace(enable_prompt_embeds=True)}, "prompt embeddings"),
        ({"parallel_config": SimpleNamespace(enable_batch_sharded_sampling=True)}, "batch-sharded"),
    ],
)
def test_what_cannot_be_steered_is_refused_at_start(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SteeringProcessorV2(config(**changes), SimpleNamespace(device=torch.device("cpu")))
