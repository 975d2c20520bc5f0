"""The core against a plain HF loop, under schedules that a runner could produce."""

import math
import random

import pytest
import torch
from torch import Tensor

from steering_reference import VOCAB_SIZE, Reference, base_description, load, params
from tiny_models import TinyModels
from trimtab_adapters.kv_pool import BLOCK_SIZE
from trimtab_adapters.record_buffer import RecordBuffer
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeredRow, SteeringCore, StepResult

TOLERANCE = 1e-4
"""Sums of float32 log-probabilities in another order differ by a few 1e-6; a wrong token or position by whole nats."""


def base_logits(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def steer(core: SteeringCore, rows: list[SteeredRow], logits: Tensor) -> StepResult:
    result = core.step([(row, index) for index, row in enumerate(rows)], logits)
    assert result is not None
    return result


@pytest.fixture
def core(residents: Residents) -> SteeringCore:
    return SteeringCore(residents.committed, vocab_size=VOCAB_SIZE, max_forward_tokens=64)


def test_rows_of_any_mixture_equal_the_plain_loop(
    core: SteeringCore, residents: Residents, reference: Reference, tiny_models: TinyModels
) -> None:
    adapter, other = load(residents, tiny_models.adapter), load(residents, tiny_models.other)
    names = {adapter: "adapter", other: "other"}
    terms = [[(adapter, 1.0)], [(other, -0.5)], [(adapter, 1.0), (other, -0.5)], [(other, 2.0), (adapter, 0.25)]]
    rng = random.Random(0)
    rows = [
        core.open(params(f"u{i}", *terms[i % 4]), [rng.randrange(1, VOCAB_SIZE) for _ in range(length)], [])
        for i, length in enumerate([1, 2, 15, 16, 17, 63, 64, 65, 130, 5])
    ]
    for step in range(3):
        base = base_logits(len(rows), seed=step)
        logits = base.clone()
        steer(core, rows, logits)
        for index, row in enumerate(rows):
            want = base[index].clone()
            for version, alpha in terms[index % 4]:
                want += alpha * reference.logprobs(names[version], row.tokens)
            assert float((logits[index] - want).abs().max()) < TOLERANCE, (index, step)
            row.append([int(logits[index].argmax())])


def test_rows_that_are_not_named_are_not_touched(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels
) -> None:
    row = core.open(params("u", (load(residents, tiny_models.adapter), 1.0)), [1, 2, 3], [])
    base = base_logits(3)
    logits = base.clone()
    core.step([(row, 1)], logits)
    assert torch.equal(logits[[0, 2]], base[[0, 2]])
    assert not torch.equal(logits[1], base[1])


def test_the_cost_of_a_step_does_not_grow_with_the_output(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels
) -> None:
    version = load(residents, tiny_models.adapter)
    row = core.open(params("u", (version, 1.0)), list(range(1, 41)), [])
    counters = residents.committed[version].pool.counters
    steer(core, [row], base_logits(1))
    assert counters.computed_tokens == 40
    for token in range(1, 50):
        row.append([token])
        steer(core, [row], base_logits(1))
    assert counters.computed_tokens == 40 + 49
    assert counters.recomputed_tokens == 0


def test_siblings_admitted_in_one_step_compute_the_shared_prompt_once(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, reference: Reference
) -> None:
    version = load(residents, tiny_models.adapter)
    prompt = [1 + i % 100 for i in range(3 * BLOCK_SIZE + 4)]
    rows = [core.open(params(f"u{i}", (version, 1.0)), prompt, []) for i in range(8)]
    logits = base_logits(1).repeat(8, 1)
    steer(core, rows, logits)
    assert residents.committed[version].pool.counters.computed_tokens == len(prompt) + 7 * 4
    want = base_logits(1)[0] + reference.logprobs("adapter", prompt)
    assert float((logits - want).abs().max()) < TOLERANCE


def test_a_row_that_comes_back_after_preemption_goes_on_where_it_was(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, reference: Reference
) -> None:
    version = load(residents, tiny_models.other)
    prompt, outputs = list(range(1, 51)), [7, 8, 9]
    row = core.open(params("u", (version, 1.0)), prompt, [])
    steer(core, [row], base_logits(1))
    core.close(row)
    assert residents.committed[version].num_rows == 0
    row = core.open(params("u", (version, 1.0)), prompt, outputs)
    logits = base_logits(1)
    steer(core, [row], logits)
    want = base_logits(1)[0] + reference.logprobs("other", prompt + outputs)
    assert float((logits[0] - want).abs().max()) < TOLERANCE
    # prefix 1 + prompt 50 = 3 whole blocks are found; the rest is computed again
    assert residents.committed[version].pool.counters.hit_tokens == 3 * BLOCK_SIZE


def test_a_pool_too_small_for_all_rows_thrashes_but_stays_right(tiny_models: TinyModels, reference: Reference) -> None:
    one_row = 10 * 2 * 2 * 16 * 2 * 32 * 4  # 10 blocks of 2 layers, keys and values, 2 heads of 32, float32
    residents = Residents(base_description(tiny_models.base), torch.device("cpu"), kv_bytes=one_row)
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE)
    version = load(residents, tiny_models.adapter)
    rng = random.Random(1)
    rows = [
        core.open(params(f"u{i}", (version, 1.0)), [rng.randrange(1, VOCAB_SIZE) for _ in range(60)], [])
        for i in range(5)
    ]
    for step in range(3):
        logits = base_logits(5)
        steer(core, rows, logits)
        for index, row in enumerate(rows):
            want = base_logits(5)[index] + reference.logprobs("adapter", row.tokens)
            assert float((logits[index] - want).abs().max()) < TOLERANCE
            row.append([step + 1])
    assert residents.committed[version].pool.counters.recomputed_tokens > 0


def test_a_row_that_fits_no_pool_fails_alone_with_a_reason(tiny_models: TinyModels) -> None:
    one_row = 6 * 2 * 2 * 16 * 2 * 32 * 4
    residents = Residents(base_description(tiny_models.base), torch.device("cpu"), kv_bytes=one_row)
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE)
    version = load(residents, tiny_models.adapter)
    long, short = (core.open(params(uid, (version, 1.0)), [1] * n, []) for uid, n in (("l", 200), ("s", 20)))
    logits = base_logits(1)
    result = steer(core, [long], logits)
    assert torch.equal(logits, base_logits(1))
    assert [row for row, _ in result.failed] == [long]
    assert "does not fit into the adapter KV budget" in str(long.error)
    assert steer(core, [short], logits).rows == [short]


NAN_AT = torch.tensor([5])


def test_nan_from_an_adapter_fails_only_the_rows_that_use_it(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, other = load(residents, tiny_models.adapter), load(residents, tiny_models.other)
    forward = residents.committed[adapter].adapter.forward
    monkeypatch.setattr(
        residents.committed[adapter].adapter, "forward", lambda *given: forward(*given).index_fill(1, NAN_AT, math.nan)
    )
    broken = core.open(params("x", (other, 1.0), (adapter, 1.0)), [1, 2], [])
    healthy = core.open(params("y", (other, 1.0)), [1, 2], [])
    logits = base_logits(2)
    result = steer(core, [broken, healthy], logits)
    assert torch.equal(logits[0], base_logits(2)[0])
    assert result.rows == [healthy]
    assert "NaN" in str(broken.error)
    # The next step does not try the failed row again, and the version's cache holds nothing of it.
    healthy.append([3])
    assert steer(core, [broken, healthy], logits).rows == [healthy]


def test_an_exception_in_an_adapter_fails_only_the_rows_that_use_it(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, other = load(residents, tiny_models.adapter), load(residents, tiny_models.other)

    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(residents.committed[adapter].adapter, "forward", explode)
    broken = core.open(params("x", (adapter, 1.0)), [1, 2], [])
    healthy = core.open(params("y", (other, 1.0)), [1, 2], [])
    result = steer(core, [broken, healthy], base_logits(2))
    assert (result.rows, [row for row, _ in result.failed]) == ([healthy], [broken])
    assert "out of memory" not in str(broken.error), "internals stay in the log"


def test_an_unknown_version_prompt_embeddings_and_placeholders_fail_the_row(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels
) -> None:
    version = load(residents, tiny_models.adapter)
    unknown = core.open(params("x", ("0" * 16, 1.0)), [1], [])
    embeds = core.open(params("y", (version, 1.0)), None, [])
    placeholder = core.open(params("z", (version, 1.0)), [1], [])
    placeholder.append([-1])
    logits = base_logits(3)
    result = steer(core, [unknown, embeds, placeholder], logits)
    assert torch.equal(logits, base_logits(3))
    assert len(result.failed) == 3
    for row, word in ((unknown, "not loaded"), (embeds, "embeddings"), (placeholder, "placeholder")):
        assert word in str(row.error)
        core.close(row)
    assert residents.committed[version].num_rows == 0


def test_records_hold_the_three_logprobs_kl_and_flips(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, reference: Reference
) -> None:
    adapter, other = load(residents, tiny_models.adapter), load(residents, tiny_models.other)
    rows = [
        core.open(params("both", (adapter, 1.0), (other, -0.5)), [1, 2, 3], []),
        core.open(params("one", (other, 1.0)), [4, 5], []),
        core.open(params("quiet", (other, 1.0), record=False), [4, 5], []),
    ]
    records, want = RecordBuffer(), []
    for step in range(4):
        base = base_logits(3, seed=step)
        base[:, 100:] = -math.inf  # as a grammar mask would
        logits = base.clone()
        result = steer(core, rows, logits)
        sampled = torch.tensor([3 + step, 50, 60])
        experts = [
            [reference.logprobs("adapter", rows[0].tokens), reference.logprobs("other", rows[0].tokens)],
            [reference.logprobs("other", rows[1].tokens)],
        ]
        want.append((base, logits, sampled, experts))
        records.observe(result, sampled)
        for row, token in zip(rows, sampled.tolist(), strict=True):
            row.append([token])
    taken = {record.uid: record for record in records.take(["both", "one", "quiet", "nobody"])}
    assert set(taken) == {"both", "one", "quiet"}
    assert taken["quiet"].num_tokens == 4
    assert taken["quiet"].token_ids == []
    for number, uid in enumerate(("both", "one")):
        record = taken[uid]
        for step, (base, steered, sampled, experts) in enumerate(want):
            token = int(sampled[number])
            b, s = torch.log_softmax(base[number], -1), torch.log_softmax(steered[number], -1)
            kl = float((s.exp() * (s - b))[:100].sum())
            assert record.token_ids[step] == token
            assert record.base_logprobs[step] == pytest.approx(float(b[token]), abs=TOLERANCE)
            assert record.steered_logprobs[step] == pytest.approx(float(s[token]), abs=TOLERANCE)
            assert record.kl[step] == pytest.approx(kl, abs=TOLERANCE)
            assert record.flipped[step] == bool(b.argmax() != s.argmax())
            for position, expert in enumerate(experts[number]):
                assert record.adapter_logprobs[position][step] == pytest.approx(float(expert[token]), abs=TOLERANCE)
    assert records.take(["both"]) == []


def test_a_step_that_runs_again_overwrites_its_record_and_a_gap_is_an_error(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels
) -> None:
    version, records = load(residents, tiny_models.adapter), RecordBuffer()
    row = core.open(params("u", (version, 1.0)), [1, 2], [])
    for token in (5, 6):  # the first sample was thrown away: the row's tokens did not change
        records.observe(steer(core, [row], base_logits(1)), torch.tensor([token]))
    row.append([6, 7, 8])
    (record,) = records.take(["u"])
    assert (record.token_ids, record.num_tokens, record.status) == ([6], 1, "ok")
    records.observe(steer(core, [row], base_logits(1)), torch.tensor([9]))
    (record,) = records.take(["u"])
    assert record.status == "failed"
    assert "without steering" in str(record.error)


def test_records_nobody_takes_are_bounded(core: SteeringCore, residents: Residents, tiny_models: TinyModels) -> None:
    version, records = load(residents, tiny_models.adapter), RecordBuffer(max_tokens=3)
    for number in range(5):
        row = core.open(params(f"u{number}", (version, 1.0)), [1], [])
        records.observe(steer(core, [row], base_logits(1)), torch.tensor([1]))
        core.close(row)
    assert [record.uid for record in records.take([f"u{n}" for n in range(5)])] == ["u2", "u3", "u4"]


def test_a_prompt_read_ahead_is_not_read_again_and_is_steered_alike(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, reference: Reference
) -> None:
    version = load(residents, tiny_models.other)  # it has a prefix
    pool = residents.committed[version].pool
    tokens = [1 + number % 90 for number in range(70)]
    row = core.open(params("u", (version, 1.0)), tokens, [])
    core.prefill([(row, 30)])
    assert pool.counters.computed_tokens == 31
    core.prefill([(row, 30)])
    assert pool.counters.computed_tokens == 31, "asking twice costs nothing"
    core.prefill([(row, 50)])
    logits = base_logits(1)
    steer(core, [row], logits)
    assert pool.counters.computed_tokens == 71
    expected = base_logits(1)[0] + reference.logprobs("other", tokens)
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0.0)


def test_reading_ahead_takes_no_row_down_and_leaves_no_garbage(
    core: SteeringCore,
    residents: Residents,
    tiny_models: TinyModels,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = load(residents, tiny_models.adapter)
    adapter = residents.committed[version].adapter
    tokens = [1 + number % 90 for number in range(70)]
    row = core.open(params("u", (version, 1.0)), tokens, [])
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "forward", lambda *_: 1 / 0)
        core.prefill([(row, 60)])
    assert row.error is None
    logits = base_logits(1)
    steer(core, [row], logits)
    expected = base_logits(1)[0] + reference.logprobs("adapter", tokens)
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0.0)
