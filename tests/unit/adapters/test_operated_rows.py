"""Operators, guidance and explanations in the core: rows of all kinds in one batch, each as if it were alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_reference import VOCAB_SIZE, Reference, load
from tiny_models import TinyModels
from trimtab_adapters.adapter_lm import load_adapter_lm
from trimtab_adapters.contract.params import AdapterWeight, Guidance, SteeringOperators, SteeringParams
from trimtab_adapters.expert import Expert, base_expert
from trimtab_adapters.kv_pool import KvPool
from trimtab_adapters.record_buffer import RecordBuffer
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeredRow, SteeringCore, StepResult

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def with_base(tiny_models: TinyModels, reference: Reference) -> Reference:
    """The reference loops, and the base under its own name."""
    loops = Reference(dict(reference.models), dict(reference.prefixes))
    from transformers import AutoModelForCausalLM

    loops.models["base"] = AutoModelForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32)
    loops.prefixes["base"] = []
    return loops


@pytest.fixture
def expert(residents: Residents, tiny_models: TinyModels) -> Expert:
    lm = load_adapter_lm(tiny_models.base, torch.device("cpu"), dtype=torch.float32)
    return base_expert(lm, KvPool(lm.geometry, residents.budget, lm.device), vocab_size=VOCAB_SIZE)


@pytest.fixture
def core(residents: Residents, expert: Expert) -> SteeringCore:
    return SteeringCore(residents.committed, vocab_size=VOCAB_SIZE, max_forward_tokens=64, base_expert=lambda: expert)


def ask(uid: str, *terms: tuple[str, float], **more: Any) -> SteeringParams:
    weights = [AdapterWeight(name="a", version=version, alpha=alpha) for version, alpha in terms]
    return SteeringParams(uid=uid, adapters=weights, record=True, **more)


def base_logits(num_rows: int, seed: int) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def steer(core: SteeringCore, rows: list[SteeredRow], logits: Tensor) -> StepResult:
    result = core.step([(row, index) for index, row in enumerate(rows)], logits)
    assert result is not None
    return result


def test_outside_its_schedule_a_row_is_the_base_bit_for_bit_and_no_adapter_runs(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, reference: Reference
) -> None:
    version = load(residents, tiny_models.adapter)
    schedule = {"start": 1, "first": 2, "decay": 0.5}
    scheduled = core.open(ask("s", (version, 1.0), operators={"schedule": schedule}), [1, 2, 3], [])
    always = core.open(ask("a", (version, 1.0)), [4, 5], [])
    records = RecordBuffer()
    for step in range(5):
        base = base_logits(2, step)
        logits = base.clone()
        result = steer(core, [scheduled, always], logits)
        factor = [0.0, 1.0, 0.5, 0.0, 0.0][step]
        if factor:
            want = base[0] + factor * reference.logprobs("adapter", scheduled.tokens)
            assert float((logits[0] - want).abs().max()) < TOLERANCE
        else:
            assert torch.equal(logits[0], base[0])
        want = base[1] + reference.logprobs("adapter", always.tokens)
        assert float((logits[1] - want).abs().max()) < TOLERANCE
        records.observe(result, torch.tensor([7, 8]))
        assert bool(scheduled.terms[0].cache.blocks) == bool(factor), "blocks go back when the schedule is over"
        scheduled.append([7])
        always.append([8])
    (record,) = records.take(["s"])
    assert [value is None for value in record.adapter_logprobs[0]] == [True, False, False, True, True]
    assert [value == 0.0 for value in record.kl] == [True, False, False, True, True]
    assert residents.committed[version].activity.rows == 5 + 2
    core.close(scheduled)
    core.close(always)
    assert residents.committed[version].pool.num_used == 0


def test_guided_rows_read_the_negative_prompt_and_their_own_output(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, with_base: Reference, expert: Expert
) -> None:
    version = load(residents, tiny_models.other)
    negative = [9, 8, 7, 6, 5, 4, 3, 2, 1] * 4
    guidance = Guidance(token_ids=negative, scale=2.5)
    rows = [
        core.open(ask("plain", (version, 1.0)), [1, 2, 3], []),
        core.open(ask("guided", guidance=guidance), [4, 5, 6, 7], []),
        core.open(ask("both", (version, -0.5), guidance=guidance), [1, 2], []),
        core.open(ask("off", (version, 1.0), guidance=Guidance(token_ids=negative, scale=1.0)), [1, 2], []),
    ]
    records = RecordBuffer()
    seen: list[Tensor] = []
    for step in range(3):
        base = base_logits(4, step)
        base[:, 120:] = -math.inf
        logits = base.clone()
        records.observe(steer(core, rows, logits), torch.tensor([11, 12, 13, 14]))
        output = rows[1].tokens[4:]
        against = with_base.logprobs("base", [*negative, *output])
        seen.append(against)
        strength = 1.5 * (torch.log_softmax(base, -1)[:, :120] - torch.stack([against] * 4)[:, :120])
        other = [with_base.logprobs("other", row.tokens)[:120] for row in rows]
        if step == 0:  # later the outputs differ, and with them the negative contexts
            want = base[2, :120] + strength[2] - 0.5 * other[2]
            assert float((logits[2, :120] - want).abs().max()) < TOLERANCE
        assert float((logits[1, :120] - base[1, :120] - strength[1]).abs().max()) < TOLERANCE
        for place in (0, 3):
            assert float((logits[place, :120] - base[place, :120] - other[place]).abs().max()) < TOLERANCE
        assert bool(torch.isneginf(logits[:, 120:]).all())
        for row, token in zip(rows, [11, 12, 13, 14], strict=True):
            row.append([token])
    taken = {record.uid: record for record in records.take(["plain", "guided", "both", "off"])}
    assert taken["guided"].negative_logprobs == pytest.approx([float(table[12]) for table in seen], abs=TOLERANCE)
    assert taken["plain"].negative_logprobs is None
    assert taken["off"].negative_logprobs is None
    for row in rows:
        core.close(row)
    assert expert.num_rows == expert.pool.num_used == 0


def test_guidance_keeps_to_the_schedule_and_out_of_the_adapters_record(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels, reference: Reference, with_base: Reference
) -> None:
    version = load(residents, tiny_models.adapter)
    guidance = Guidance(token_ids=[9, 8, 7], scale=2.0)
    over = core.open(ask("over", guidance=guidance, operators={"schedule": {"first": 1}}), [1, 2], [5])
    both = core.open(ask("both", (version, 1.0), guidance=guidance), [1, 2], [])
    base = base_logits(2, 0)
    logits = base.clone()
    assert steer(core, [over, both], logits).rows == [over, both]
    assert torch.equal(logits[0], base[0])
    records = RecordBuffer()  # alone, the row's sum and its adapter's table could be one tensor
    records.observe(steer(core, [both], base[1:].clone()), torch.tensor([6]))
    expert = reference.logprobs("adapter", [1, 2])
    against = with_base.logprobs("base", [9, 8, 7])
    want = base[1] + expert + torch.log_softmax(base[1], -1) - against
    torch.testing.assert_close(logits[1], want, atol=TOLERANCE, rtol=0.0)
    (record,) = records.take(["both"])
    assert record.adapter_logprobs[0] == pytest.approx([float(expert[6])], abs=TOLERANCE)
    assert record.negative_logprobs == pytest.approx([float(against[6])], abs=TOLERANCE)


def test_a_guided_row_that_comes_back_reads_the_same(core: SteeringCore, with_base: Reference, expert: Expert) -> None:
    params = ask("u", guidance=Guidance(token_ids=[3, 2, 1], scale=3.0))
    row = core.open(params, [1, 2], [5, 6])
    assert row.guidance is not None
    assert row.guidance.tokens == [3, 2, 1, 5, 6]
    later = core.open(params, (), (), num_prompt_tokens=2)  # as under V2: ids come afterwards
    later.append([1])
    later.append([2, 5])
    later.append([6])
    assert later.guidance is not None
    assert later.guidance.tokens == [3, 2, 1, 5, 6]
    assert later.tokens == row.tokens


def test_without_an_expert_a_guided_row_fails_alone(residents: Residents, tiny_models: TinyModels) -> None:
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE)
    version = load(residents, tiny_models.adapter)
    guided = core.open(ask("g", guidance=Guidance(token_ids=[1], scale=2.0)), [1], [])
    plain = core.open(ask("p", (version, 1.0)), [1], [])
    result = steer(core, [guided, plain], base_logits(2, 0))
    assert [row.params.uid for row, _ in result.failed] == ["g"]
    assert "negative prompt" in str(guided.error)
    assert result.rows == [plain]


@pytest.mark.parametrize(
    ("operators", "changed"),
    [
        ({"plausibility": 0.3}, lambda b, a: (b + a).masked_fill(b.softmax(-1) < 0.3 * b.softmax(-1).max(), -math.inf)),
        ({"schedule": {"decay": 0.5}}, lambda b, a: b + a),
    ],
)
def test_an_operator_acts_on_its_own_row_alone(
    core: SteeringCore,
    residents: Residents,
    tiny_models: TinyModels,
    reference: Reference,
    operators: dict[str, Any],
    changed: Callable[[Tensor, Tensor], Tensor],
) -> None:
    version = load(residents, tiny_models.adapter)
    rows = [
        core.open(ask("plain", (version, 1.0)), [1, 2, 3], []),
        core.open(ask("operated", (version, 1.0), operators=operators), [4, 5], []),
        core.open(ask("explained", num_alternatives=3), [4, 5], []),
    ]
    base = base_logits(3, 1)
    logits = base.clone()
    records = RecordBuffer()
    records.observe(steer(core, rows, logits), torch.tensor([int(base[1].argmax())] * 3))
    added = reference.logprobs("adapter", [4, 5])
    torch.testing.assert_close(logits[1], changed(base[1], added), atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(logits[0], base[0] + reference.logprobs("adapter", [1, 2, 3]), atol=TOLERANCE, rtol=0.0)
    assert torch.equal(logits[2], base[2])
    (record,) = records.take(["operated"])
    steered, plain = torch.log_softmax(logits[1], -1), torch.log_softmax(base[1], -1)
    kl = (steered.exp() * torch.where(torch.isneginf(steered), 0.0, steered - plain)).sum()
    assert record.kl[0] == pytest.approx(float(kl), abs=TOLERANCE)


def test_a_cap_on_kl_holds_for_its_row(core: SteeringCore, residents: Residents, tiny_models: TinyModels) -> None:
    version = load(residents, tiny_models.adapter)
    caps = [None, 0.01, 0.1]
    rows = [
        core.open(ask(f"u{n}", (version, 2.0), operators=SteeringOperators(max_kl=cap)), [1, 2, 3], [])
        for n, cap in enumerate(caps)
    ]
    records = RecordBuffer()
    records.observe(steer(core, rows, base_logits(1, 0).repeat(3, 1)), torch.tensor([1, 1, 1]))
    free, tight, loose = (record.kl[0] for record in records.take(["u0", "u1", "u2"]))
    assert free > 0.2
    assert tight == pytest.approx(0.01, rel=2e-3)
    assert loose == pytest.approx(0.1, rel=2e-3)


def test_records_can_be_read_while_they_grow(core: SteeringCore, residents: Residents, tiny_models: TinyModels) -> None:
    version, records = load(residents, tiny_models.adapter), RecordBuffer()
    row = core.open(ask("u", (version, 1.0), num_alternatives=2), [1, 2, 3], [])
    for token in (10, 11, 12):
        records.observe(steer(core, [row], base_logits(1, token)), torch.tensor([token]))
        row.append([token])
    (part,) = records.read({"u": 1, "nobody": 0})
    assert (part.token_ids, part.num_tokens) == ([11, 12], 2)
    assert part.alternatives is not None
    assert [len(place.after) for place in part.alternatives] == [2, 2]
    (whole,) = records.take(["u"])
    assert whole.token_ids == [10, 11, 12]
    assert whole.kl[1:] == part.kl
    assert whole.alternatives is not None
    assert whole.alternatives[1:] == part.alternatives


def test_explanations_count_for_what_they_weigh(
    core: SteeringCore, residents: Residents, tiny_models: TinyModels
) -> None:
    version, records = load(residents, tiny_models.adapter), RecordBuffer(max_tokens=50)
    for number in range(3):
        row = core.open(ask(f"u{number}", (version, 1.0), num_alternatives=10), [1], [])
        records.observe(steer(core, [row], base_logits(1, number)), torch.tensor([1]))
        core.close(row)
    assert [record.uid for record in records.take(["u0", "u1", "u2"])] == ["u1", "u2"]
    row = core.open(ask("after", (version, 1.0)), [1], [])
    for _ in range(40):
        records.observe(steer(core, [row], base_logits(1, 0)), torch.tensor([1]))
        row.append([1])
    assert records.take(["after"])[0].num_tokens == 40
