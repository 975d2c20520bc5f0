"""Faults injected into the serving path: who fails, who does not, and whether all is well when the fault is gone."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fault_desk import TOLERANCE, Desk, sample
from steering_reference import VOCAB_SIZE, Reference, base_description, load
from tiny_models import TinyModels
from trimtab_adapters import mixing
from trimtab_adapters.attention import PagedBatch
from trimtab_adapters.contract.params import FAILED_LOGPROB
from trimtab_adapters.packed_rows import PackedRows
from trimtab_adapters.residents import Residents, ResidentVersion
from trimtab_adapters.vllm import processor_v1
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor

CPU = torch.device("cpu")
LONG = [1 + index % 90 for index in range(50)]
"""A prompt of three whole blocks and two tokens."""
SHORT = [5, 6, 7]


@pytest.fixture
def processor(residents: Residents, monkeypatch: pytest.MonkeyPatch) -> SteeringProcessor:
    monkeypatch.setattr(processor_v1, "build_residents", lambda config, device: residents)
    return SteeringProcessor(None, CPU, False)


@pytest.fixture
def adapter(processor: SteeringProcessor, tiny_models: TinyModels) -> str:
    """The version whose faults are injected; `other` shares its pool."""
    return load(processor.residents, tiny_models.adapter)


@pytest.fixture
def other(processor: SteeringProcessor, tiny_models: TinyModels) -> str:
    return load(processor.residents, tiny_models.other)


@pytest.fixture
def desk(processor: SteeringProcessor, reference: Reference, adapter: str, other: str) -> Desk:
    return Desk(processor, reference, {adapter: "adapter", other: "other"})


def resident_of(desk: Desk, version: str) -> ResidentVersion:
    return desk.processor.residents.committed[version]


@contextmanager
def faulty(target: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a method by a faulty one for a while."""
    plain = getattr(target, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, wrap(plain))
        yield


def raising(error: BaseException, *, after: int = 0) -> Callable[[Any], Any]:
    """Let a method do its work so many times and raise from then on."""
    calls = iter(range(1_000_000))

    def wrap(plain: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= after:
                raise error
            return plain(*args, **kwargs)

        return method

    return wrap


@contextmanager
def nan_pass(desk: Desk, version: str, token: int | None = None) -> Iterator[None]:
    """A weight is NaN for a while: so are keys, values and logits of all rows, or of those that hold a token."""

    def wrap(plain: Any) -> Any:
        def next_token_logits(packed: PackedRows, victims: Any = ()) -> Tensor:
            logits: Tensor = plain(packed, victims).clone()
            resident = resident_of(desk, version)
            storage = [item for value in vars(resident.pool).values() if isinstance(value, list) for item in value]
            for place, row in enumerate(packed._rows):
                if row.cache.root == resident.cache_root and (token is None or token in row.tokens):
                    logits[place] = math.nan
                    for tensor in storage:
                        if isinstance(tensor, Tensor):
                            tensor[row.cache.blocks] = math.nan
            return logits

        return next_token_logits

    with faulty(PackedRows, "next_token_logits", wrap):
        yield


def assert_well(desk: Desk, adapter: str, other: str) -> None:
    """Whatever happened before: new requests, with the prompts of the old ones too, are exact."""
    desk.clear()
    for number in range(2):  # the second time the prompts are found by name
        for uid, prompt, terms in (
            ("long", LONG, [(adapter, 1.0)]),
            ("short", SHORT, [(adapter, -0.5)]),
            ("both", LONG, [(other, 1.0), (adapter, 0.5)]),
            ("beginning", LONG[:20], [(other, 1.0)]),
            ("elsewhere", [60 + token % 40 for token in LONG], [(other, 2.0)]),
        ):
            desk.admit(f"{uid}-{number}", prompt, *terms)
        for _ in range(3):
            assert set(desk.step().values()) == {None}
        desk.clear()


def admit_three(desk: Desk, adapter: str, other: str) -> None:
    """One request that uses the faulty version alone, one that uses it as its second, one that does not use it."""
    desk.admit("faulty", LONG, (adapter, 1.0))
    desk.admit("mixed", LONG, (other, 1.0), (adapter, -0.5))
    desk.admit("healthy", LONG, (other, 1.0))
    desk.admit("plain", SHORT)


ERRORS = [RuntimeError("cublas"), torch.OutOfMemoryError("no memory"), MemoryError(), AssertionError("shape")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("num_passes", [0, 1])
def test_an_exception_in_a_pass_fails_the_requests_of_that_version_and_leaves_no_garbage(
    desk: Desk, adapter: str, other: str, error: Exception, num_passes: int
) -> None:
    """Blocks were named before the pass that should have written them; in the second pass the first were written."""
    desk.processor.core.passes.max_forward_tokens = 32
    admit_three(desk, adapter, other)
    with faulty(resident_of(desk, adapter).adapter, "forward", raising(error, after=num_passes)):
        errors = desk.step()
    assert [uid for uid, text in errors.items() if text] == ["faulty", "mixed"]
    assert all(f"{adapter} failed: {type(error).__name__}" in str(errors[uid]) for uid in ("faulty", "mixed"))
    after = desk.step()
    assert after["healthy"] is None
    assert after["faulty"], "a failed request stays failed"
    assert_well(desk, adapter, other)


def test_an_exception_inside_a_layer_leaves_no_half_written_blocks(desk: Desk, adapter: str, other: str) -> None:
    """The first layer's keys are written, the second's are not."""

    def wrap(plain: Any) -> Any:
        def forward(*args: Any) -> Tensor:
            with faulty(PagedBatch, "attend", raising(RuntimeError("bug"), after=1)):
                return cast(Tensor, plain(*args))

        return forward

    admit_three(desk, adapter, other)
    with faulty(resident_of(desk, adapter).adapter, "forward", wrap):
        errors = desk.step()
    assert [uid for uid, text in errors.items() if text] == ["faulty", "mixed"]
    assert_well(desk, adapter, other)


def test_an_exception_while_decoding_spares_those_that_come_later(desk: Desk, adapter: str, other: str) -> None:
    admit_three(desk, adapter, other)
    assert set(desk.step().values()) == {None}
    with faulty(resident_of(desk, adapter).adapter, "forward", raising(torch.OutOfMemoryError("no memory"))):
        assert [uid for uid, text in desk.step().items() if text] == ["faulty", "mixed"]
    desk.admit("later", LONG, (adapter, 1.0))
    errors = desk.step()
    assert (errors["later"], errors["healthy"]) == (None, None)
    assert_well(desk, adapter, other)


def test_nan_logits_of_one_row_fail_that_row_alone(desk: Desk, adapter: str, other: str) -> None:
    def poison_first(plain: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            logits: Tensor = plain(*args, **kwargs).clone()
            logits[0, 3] = math.nan
            return logits

        return forward

    desk.admit("first", LONG, (adapter, 1.0))
    desk.admit("sibling", LONG, (adapter, 1.0))
    desk.admit("healthy", SHORT, (other, 1.0), (adapter, 0.5))
    with faulty(resident_of(desk, adapter).adapter, "forward", poison_first):
        errors = desk.step()
    assert "NaN" in str(errors["first"])
    assert (errors["sibling"], errors["healthy"]) == (None, None)
    assert desk.step()["sibling"] is None
    assert_well(desk, adapter, other)


def test_weights_that_turn_nan_fail_their_version_until_they_are_right_again(
    desk: Desk, adapter: str, other: str
) -> None:
    """Also for requests that are decoding, and with NaN keys and values left behind in blocks that others get."""
    desk.admit("decoding", LONG[::-1], (adapter, 1.0))
    desk.step()
    admit_three(desk, adapter, other)
    with nan_pass(desk, adapter):
        errors = desk.step()
    assert [uid for uid, text in errors.items() if text] == ["decoding", "faulty", "mixed"]
    assert all("NaN" in str(errors[uid]) for uid in ("decoding", "faulty", "mixed"))
    assert desk.step()["healthy"] is None
    assert_well(desk, adapter, other)


def test_a_token_whose_embedding_is_nan_fails_only_the_rows_that_hold_it(desk: Desk, adapter: str, other: str) -> None:
    """Both siblings share the blocks that hold garbage; neither may leave them to be found."""
    desk.admit("first", LONG, (adapter, 1.0))
    desk.admit("sibling", [*LONG, 9], (adapter, 1.0))
    desk.admit("healthy", [60 + token % 30 for token in LONG], (adapter, 1.0))
    with nan_pass(desk, adapter, token=LONG[20]):
        errors = desk.step()
    assert [uid for uid, text in errors.items() if text] == ["first", "sibling"]
    assert desk.step()["healthy"] is None
    assert_well(desk, adapter, other)


def test_pool_exhaustion_fails_with_a_text_and_is_over_when_the_request_is(
    tiny_models: TinyModels, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight blocks: the long request needs ten, the others share what there is."""
    block_bytes = 2 * 2 * 16 * 2 * 32 * 4
    small = Residents(base_description(tiny_models.base), CPU, kv_bytes=9 * block_bytes, dtype=torch.float32)
    monkeypatch.setattr(processor_v1, "build_residents", lambda config, device: small)
    processor = SteeringProcessor(None, CPU, False)
    adapter, other = load(small, tiny_models.adapter), load(small, tiny_models.other)
    desk = Desk(processor, reference, {adapter: "adapter", other: "other"})
    desk.admit("healthy", LONG, (other, 1.0))
    desk.admit("long", [1 + index % 97 for index in range(150)], (adapter, 1.0))
    for _ in range(2):
        errors = desk.step()
        assert errors["healthy"] is None
        assert "out of adapter KV cache" in str(errors["long"])
    desk.end(*(request for request in desk.requests if request.uid == "long"))
    desk.admit("later", LONG, (adapter, 1.0))
    assert desk.step() == {"healthy": None, "later": None}
    assert_well(desk, adapter, other)


def test_an_error_in_the_mixture_fails_the_step_and_nothing_after_it(desk: Desk, adapter: str, other: str) -> None:
    admit_three(desk, adapter, other)
    with faulty(mixing, "steering_term", raising(torch.OutOfMemoryError("no memory"))):
        errors = desk.step()
    assert [uid for uid, text in errors.items() if text] == ["faulty", "mixed", "healthy"]
    assert all("OutOfMemoryError" in str(text) for text in errors.values() if text)
    assert_well(desk, adapter, other)


def test_requests_end_as_usual_while_their_version_is_faulty(desk: Desk, adapter: str, other: str) -> None:
    """Failed rows hold nothing back: the version can be retired and its memory freed."""
    admit_three(desk, adapter, other)
    with faulty(resident_of(desk, adapter).adapter, "forward", raising(RuntimeError("bug"))):
        desk.step()
        residents = desk.processor.residents
        assert residents.retire(adapter) == 2
        desk.end(*(request for request in desk.requests if request.uid in ("faulty", "mixed")))
        assert residents.retire(adapter) == 0
    assert desk.step() == {"healthy": None, "plain": None}


def test_an_error_while_recording_is_over_with_the_step(desk: Desk, adapter: str, other: str) -> None:
    processor = desk.processor
    first, second = desk.admit("first", LONG, (adapter, 1.0)), desk.admit("second", SHORT, (other, 1.0))
    processor.update_state(desk.runner.take_update())
    with faulty(processor.records, "_measure", raising(RuntimeError("bug"))):
        output = sample(processor, torch.zeros(2, VOCAB_SIZE))
    assert output.logprobs_tensors.logprobs.flatten().tolist() == [FAILED_LOGPROB] * 2
    desk.end(first, second)
    assert [record.status for record in processor.records.take(["first", "second"])] == ["failed", "failed"]
    desk.admit("third", LONG, (adapter, 1.0))
    processor.update_state(desk.runner.take_update())
    output = sample(processor, torch.zeros(1, VOCAB_SIZE))
    want = torch.log_softmax(desk.reference.logprobs("adapter", LONG), dim=-1).max()
    assert float(output.logprobs_tensors.logprobs[0, 0]) == pytest.approx(float(want), abs=TOLERANCE)
    assert [record.status for record in processor.records.take(["third"])] == ["ok"]


def test_a_failing_discard_mask_never_leaves_the_processor(desk: Desk, adapter: str, other: str) -> None:
    admit_three(desk, adapter, other)
    with faulty(desk.processor, "discarded", raising(RuntimeError("bug"))):
        errors = desk.step()
    assert [uid for uid, text in errors.items() if text] == ["faulty", "mixed", "healthy"]
    assert_well(desk, adapter, other)
