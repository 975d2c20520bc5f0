"""Whole schedules, recorded or written by hand, replayed under Model Runner V2's host code."""

import random
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from runner_schedules import Schedule, ScheduledRequest, Step, V1Step, from_v1, read_schedule, replay
from simulated_v2_runner import SampledRow
from steering_reference import Reference
from tiny_models import TinyModels
from trimtab_adapters.residents import Residents
from v2_bench import V2Bench, make_bench

SCHEDULES = Path(__file__).parent / "schedules"


@pytest.fixture
def bench(
    residents: Residents, tiny_models: TinyModels, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> V2Bench:
    return make_bench(residents, tiny_models, reference, monkeypatch)


def run_schedule(bench: V2Bench, schedule: Schedule) -> list[SampledRow]:
    seen: list[SampledRow] = []

    def check(step: Step, rows: list[SampledRow]) -> None:
        assert {row.name for row in rows} == set(step.schedule)
        bench.check(rows)
        seen.extend(rows)

    replay(
        schedule,
        bench.engine,
        lambda name, steered: bench.sampling(name, [("adapter", 1.0), ("other", -0.5)] if steered else []),
        check,
    )
    return seen


def assert_nothing_is_left(bench: V2Bench, schedule: Schedule) -> None:
    """Every steered request has a whole record, and after the last step no row holds anything."""
    for name, request in schedule.requests.items():
        outputs = bench.engine.requests[name].outputs
        records = bench.processor.records.take([name])
        assert len(records) == (1 if request.steered and outputs else 0)
        for record in records:
            assert (record.status, record.token_ids) == ("ok", outputs)
    assert bench.num_held == 0
    assert {resident.pool.num_used for resident in bench.processor.residents.committed.values()} == {0}


@pytest.mark.parametrize("path", sorted(SCHEDULES.glob("*.json")), ids=lambda path: path.stem)
def test_a_recorded_schedule_equals_the_plain_loop(bench: V2Bench, path: Path) -> None:
    schedule = read_schedule(path)
    rows = run_schedule(bench, schedule)
    assert any(not row.counts for row in rows), "the schedule is to have a chunked prefill"
    assert any(step.preempt for step in schedule.steps), "and a preemption"
    assert_nothing_is_left(bench, schedule)


def random_schedule(seed: int, num_steps: int = 40, num_slots: int = 4, budget: int = 24) -> Schedule:
    """A scheduler with more requests than slots that preempts, aborts, chunks and skips at random."""
    rng = random.Random(seed)
    requests: dict[str, ScheduledRequest] = {}
    total: dict[str, int] = {}  # tokens of a request, outputs included
    left: dict[str, int] = {}  # of a running request: tokens that are not computed yet
    preempted: list[str] = []
    steps: list[Step] = []
    for _ in range(num_steps):
        step = Step()
        for name in list(left):
            if rng.random() < 0.04:
                step.finish.append(name)
            elif rng.random() < 0.06:
                step.preempt.append(name)
                preempted.append(name)
        for name in (*step.finish, *step.preempt):
            del left[name]
        room = 0 if rng.random() < 0.05 else budget
        for name in rng.sample(list(left), len(left)):
            if room and rng.random() < 0.9:
                step.schedule[name] = min(left[name], room, rng.choice([5, 11, budget]))
                room -= step.schedule[name]
        while room and len(left) < num_slots and rng.random() < 0.6:
            if preempted and rng.random() < 0.7:
                name = preempted.pop()
            else:
                name = f"r{len(requests)}"
                prompt = [rng.choice([3, rng.randrange(1, 128)]) for _ in range(rng.choice([1, 2, 16, 17, 40]))]
                requests[name] = ScheduledRequest(prompt=prompt, steered=rng.random() < 0.75)
                total[name] = len(prompt)
            left[name] = total[name]
            step.arrive.append(name)
            step.schedule[name] = min(left[name], room)
            room -= step.schedule[name]
        for name, count in step.schedule.items():
            left[name] -= count
            if left[name] == 0:  # sampled
                left[name] = 1
                total[name] += 1
        steps.append(step)
    steps.append(Step(finish=list(left)))
    return Schedule(requests=requests, steps=steps)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_schedule_equals_the_plain_loop(bench: V2Bench, seed: int) -> None:
    """Seeds are fixed: the verdict is the same in every run."""
    schedule = random_schedule(seed)
    rows = run_schedule(bench, schedule)
    assert sum(row.counts for row in rows) > 30
    assert any(step.preempt for step in schedule.steps)
    assert_nothing_is_left(bench, schedule)


def test_what_a_v1_processor_saw_becomes_a_schedule(bench: V2Bench) -> None:
    """Rows: 0 = first, 1 = a plain one; first is preempted by the move of the plain one into its row, and returns."""

    def update(**changes: Any) -> BatchUpdate:
        return BatchUpdate(**({"batch_size": 2, "removed": (), "added": (), "moved": ()} | changes))

    first, plain = bench.sampling("first", [("adapter", 1.0)]), SamplingParams()
    steps = [
        V1Step(update(added=((0, first, [1, 2, 3, 4, 5], []), (1, plain, [7, 8], []))), [True, False]),
        V1Step(None, [False, False]),
        V1Step(update(moved=((1, 0, MoveDirectionality.UNIDIRECTIONAL),)), [False]),
        V1Step(update(added=((1, first, [1, 2, 3, 4, 5], [9]),)), [False, False]),
        V1Step(update(removed=(0, 1)), None),
    ]
    schedule = from_v1(steps)
    assert schedule.model_dump(exclude_defaults=True)["steps"] == [
        {"arrive": ["first", "unsteered-1"], "schedule": {"first": 2, "unsteered-1": 2}},
        {"schedule": {"first": 3, "unsteered-1": 1}},
        {"schedule": {"unsteered-1": 1}, "preempt": ["first"]},
        {"arrive": ["first"], "schedule": {"unsteered-1": 1, "first": 6}},
        {"finish": ["unsteered-1", "first"]},
    ]
    rows = run_schedule(bench, schedule)
    assert sum(row.name == "first" and row.counts for row in rows) == 2


def test_a_v1_prefill_that_was_broken_off_is_replayed_as_one(bench: V2Bench) -> None:
    first = bench.sampling("first", [("adapter", 1.0)])
    steps = [
        V1Step(BatchUpdate(1, (), ((0, first, [1] * 9, []),), ()), [True]),
        V1Step(BatchUpdate(1, (), ((0, first, [1] * 9, []),), ()), [True]),
        V1Step(None, [False]),
    ]
    schedule = from_v1(steps)
    assert [step.schedule for step in schedule.steps] == [{"first": 1}, {"first": 4}, {"first": 5}]
    assert schedule.steps[1].preempt == schedule.steps[1].arrive == ["first"]
    run_schedule(bench, schedule)
