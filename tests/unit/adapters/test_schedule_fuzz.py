"""The V1 shell and the steering core under random schedules, each step compared with plain HF forward passes.

`FUZZ_STEPS=200000 make test TESTS=tests/unit/adapters/test_schedule_fuzz.py` searches longer, with fresh seeds.
"""

import functools
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from typing_extensions import override
from vllm import SamplingParams

from batch_runner import BatchRunner
from forward_fault import ForwardFault
from operator_reference import Operators
from schedule_checks import check_accounting, check_membership, check_read_ahead, open_rows
from schedule_job import TOLERANCE, Job, asked, steered_rows
from schedule_world import BLOCK_BYTES, NUM_TOKENS, SCRIPT_LENGTH, Expert, World, make_world
from trimtab_adapters import residents as residents_module
from trimtab_adapters.contract.errors import ConflictError, NotFoundError
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvPool
from trimtab_adapters.steering import SteeredRow
from trimtab_adapters.vllm import processor_v1
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor

DEFAULT_STEPS = 10_000
NUM_STEPS = int(os.environ.get("FUZZ_STEPS", DEFAULT_STEPS))
"""Least number of `apply` calls that a search makes and checks."""
STEPS_PER_EXAMPLE = 100
MAX_ROWS = 6
EVENTS = (
    "admitted",
    "admitted again",
    "capped",
    "discarded",
    "ended early",
    "index refilled unseen",
    "moved",
    "no room for a version",
    "out of cache",
    "outside its schedule",
    "plausible only",
    "preempted",
    "reading ahead failed",
    "refused",
    "reset",
    "steered",
    "steered by several",
    "tokens computed again",
    "tokens found by name",
    "tokens read ahead",
    "version retired while rows held it",
)
"""What a search must meet often; counted so that it cannot shrink to nothing unseen."""


@dataclass
class Tally:
    """What a whole search did."""

    num_applies: int = 0
    events: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(EVENTS, 0)))


OPERATORS = st.one_of(
    st.just(Operators()),
    st.builds(
        Operators,
        start=st.integers(0, 4),
        first=st.none() | st.integers(1, 12),
        decay=st.sampled_from([1.0, 0.8]),
        plausibility=st.sampled_from([None, None, 0.02, 0.3, 1.0]),
        max_kl=st.sampled_from([None, None, 0.002, 0.05, 0.7]),
    ),
)
"""Fractions and caps from a few values, none of which is a tie in the world's base logits."""


class ScheduleMachine(RuleBasedStateMachine):
    """Requests come, go and come back while versions change under them; every step is checked row by row."""

    def __init__(self, world: World, tally: Tally, fault: ForwardFault) -> None:
        super().__init__()
        self.world, self.tally, self.fault = world, tally, fault
        self.runner = BatchRunner()
        self.waiting: list[Job] = []
        self.leaving: dict[Job, int] = {}
        self.swaps: list[tuple[int, int]] = []
        self.committed: set[str] = set()
        self.prepared: set[str] = set()
        self.num_jobs = 0
        self.num_steps = 0
        self.is_sound = False

    @property
    def batch(self) -> list[Job]:
        return [job for job in self.runner.rows if isinstance(job, Job)]

    @initialize(
        num_blocks=st.sampled_from([10, 24, 40, 80, 160, 400]),
        max_forward_tokens=st.sampled_from([11, 40, 2048]),
        is_async=st.booleans(),
        reads_ahead=st.sampled_from([True, True, False]),
        has_engine_backend=st.booleans(),
        order=st.permutations(range(5)),
    )
    def start(
        self,
        num_blocks: int,
        max_forward_tokens: int,
        is_async: bool,
        reads_ahead: bool,
        has_engine_backend: bool,
        order: Sequence[int],
    ) -> None:
        make_residents = functools.partial(self.world.build_residents, has_engine_backend=has_engine_backend)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processor_v1, "build_residents", lambda kv_bytes, device: make_residents(kv_bytes))
            self.processor = SteeringProcessor(num_blocks * BLOCK_BYTES, torch.device("cpu"), False)
        self.processor.core.passes.max_forward_tokens = max_forward_tokens
        self.processor.discarded = self.discard_mask
        if reads_ahead:  # as the worker extension attaches it
            self.processor.computed = lambda num_rows: [job.num_computed for job in self.batch]
        self.is_async = is_async
        self.is_sound = True
        for which in order[:3]:
            self.prepare_version(which)
            self.commit_version(which)

    def discard_mask(self, num_rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        assert num_rows == len(self.batch)
        return np.array([job.num_chunks > 0 for job in self.batch], np.bool_)

    # Versions

    @precondition(lambda self: self.batch or self.waiting)
    @rule(which=st.integers(0, 4), action=st.sampled_from(["prepare", "commit", "retire", "swap"]))
    def change_version(self, which: int, action: str) -> None:
        if action in ("prepare", "swap"):
            self.prepare_version(which)
        if action in ("commit", "swap"):
            self.commit_version(which)
        if action == "retire":
            self.retire_version(which)
        if action == "swap":
            self.retire_version((which + 1) % len(self.world.experts))

    def prepare_version(self, which: int) -> None:
        expert, residents = self.world.experts[which], self.processor.residents
        residents.prepare(expert.version, str(expert.directory))
        for thread in threading.enumerate():
            if thread.name == f"load-{expert.version}":
                thread.join()
        status = residents.poll(expert.version)
        if status.state == "failed":
            assert "no room" in str(status.error), "only the memory of other pools is a reason here"
            self.tally.events["no room for a version"] += 1
        elif expert.name not in self.committed:
            assert status.state == "prepared"
            self.prepared.add(expert.name)

    def commit_version(self, which: int) -> None:
        expert, residents = self.world.experts[which], self.processor.residents
        is_there = expert.name in self.committed | self.prepared or bool(self.holders(expert))
        try:
            residents.commit(expert.version)
        except (ConflictError, NotFoundError):
            assert not is_there
            return
        assert is_there
        self.prepared.discard(expert.name)
        self.committed.add(expert.name)

    def retire_version(self, which: int) -> None:
        expert = self.world.experts[which]
        num_held = self.processor.residents.retire(expert.version)
        assert num_held == len(self.holders(expert))
        self.committed.discard(expert.name)
        self.prepared.discard(expert.name)
        self.tally.events["version retired while rows held it"] += num_held > 0

    def holders(self, expert: Expert) -> list[SteeredRow]:
        """Open rows that hold a version."""
        return [
            row for row in open_rows(self.processor) if expert.version in [term.expert.version for term in row.terms]
        ]

    # Requests

    @precondition(lambda self: len(self.batch) + len(self.waiting) < 2 * MAX_ROWS)
    @rule(
        number=st.integers(0, 24),
        num_prompt=st.integers(1, SCRIPT_LENGTH - 2),
        max_outputs=st.integers(1, 40),
        num_chunks=st.integers(0, 2),
        num_candidates=st.integers(1, 3),
        terms=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, -1.0, 0.5, -0.7, 2.5, 0.0])), max_size=3),
        is_known=st.sampled_from([True] * 7 + [False]),
        has_record=st.booleans(),
        operators=OPERATORS,
    )
    def arrive(
        self,
        number: int,
        num_prompt: int,
        max_outputs: int,
        num_chunks: int,
        num_candidates: int,
        terms: list[tuple[int, float]],
        is_known: bool,
        has_record: bool,
        operators: Operators,
    ) -> None:
        """Candidates of one prompt, or of prompts that begin alike, whose outputs go different ways."""
        experts = [e for e in self.world.experts if e.name in self.committed or not is_known] or self.world.experts
        named = list(
            {experts[which % len(experts)].name: (experts[which % len(experts)], a) for which, a in terms}.values()
        )
        weights = [AdapterWeight(name=expert.name, version=expert.version, alpha=alpha) for expert, alpha in named]
        for candidate in range(num_candidates):
            script_number = number if number == 24 else number // 4 * 4 + (number + candidate) % 4
            script = self.world.scripts[script_number]
            uid = f"job-{self.num_jobs}"
            self.num_jobs += 1
            params = SteeringParams(uid=uid, adapters=weights, record=has_record, operators=asked(operators))
            sampling = SamplingParams(logprobs=0, extra_args=dict(params.to_xargs()) if terms else None)
            job = Job(sampling, script[:num_prompt], uid=uid, script=script, script_number=script_number)
            job.terms = [(expert, alpha) for expert, alpha in named if alpha]
            job.has_record, job.operators = has_record, operators
            job.be_chunked(num_chunks)
            job.max_outputs = min(max_outputs, SCRIPT_LENGTH - 1 - num_prompt)
            self.waiting.append(job)

    @precondition(lambda self: self.batch)
    @rule(which=st.integers(0, MAX_ROWS - 1), pause=st.sampled_from([0, 0, 0, 1, 2, 4]), num_chunks=st.integers(0, 2))
    def leave(self, which: int, pause: int, num_chunks: int) -> None:
        """End a request (pause 0), or have it back in the same step (1) or later: preempted, or not scheduled."""
        job = self.batch[which % len(self.batch)]
        if job not in self.leaving:
            self.leaving[job] = pause
            job.be_chunked(num_chunks if pause else 0)
            self.tally.events["ended early" if pause == 0 else "reset" if pause == 1 else "preempted"] += 1

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, MAX_ROWS - 1))
    def abort_while_waiting(self, which: int) -> None:
        self.settle(self.waiting.pop(which % len(self.waiting)))

    @precondition(lambda self: len(self.batch) > 1)
    @rule(first=st.integers(0, MAX_ROWS - 1), second=st.integers(0, MAX_ROWS - 1))
    def swap(self, first: int, second: int) -> None:
        self.swaps.append((first, second))

    # Steps

    @precondition(lambda self: self.batch or self.waiting)
    @rule(count=st.integers(1, 12))
    def decode(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.batch or self.waiting)
    @rule(count=st.integers(1, 4))
    def decode_a_little(self, count: int) -> None:
        self.decode(count)

    @precondition(lambda self: self.batch or self.waiting)
    @rule(applies=st.booleans())
    def odd_step(self, applies: bool) -> None:
        """A step without `apply`, or one whose samples are lost, so that the next one sees the same tokens again."""
        self.step(applies=applies, keeps_samples=False)

    @precondition(lambda self: any(job.num_chunks and job.terms for job in self.waiting))
    @rule()
    def fail_while_reading_ahead(self) -> None:
        self.fault.is_due = True
        self.step()
        self.fault.is_due = False

    def step(self, *, applies: bool = True, keeps_samples: bool = True) -> None:
        self.is_sound = False
        self.update_batch()
        self.check_accounting()
        if applies and self.batch:
            self.apply()
            self.tally.events["tokens read ahead"] += check_read_ahead(self.processor, self.batch)
            self.check_accounting()
            self.end_step(keeps_samples)
        self.is_sound = True

    def update_batch(self) -> None:
        ended = [job for job, pause in self.leaving.items() if pause == 0]
        for job, pause in self.leaving.items():
            self.runner.remove(job)
            if pause:
                job.wait = pause
                self.waiting.append(job)
        for job in list(self.waiting):
            job.wait -= 1
            if job.wait <= 0 and self.runner.num_rows < MAX_ROWS:
                self.waiting.remove(job)
                self.admit(job)
        self.runner.condense()
        for pair in self.swaps:
            first, second = (place % max(len(self.batch), 1) for place in pair)
            if first != second:
                self.runner.swap(first, second)
        update = self.runner.take_update()
        self.processor.update_state(update)
        if update is not None:
            self.tally.events["moved"] += len(update.moved)
            self.tally.events["index refilled unseen"] += len(self.leaving) > len(update.removed)
        self.leaving, self.swaps = {}, []
        for job in ended:
            self.settle(job)

    def admit(self, job: Job) -> None:
        prompt, outputs = len(job.prompt_token_ids), job.num_outputs
        job.output_token_ids = job.script[prompt : prompt + outputs]  # another list than before
        if self.is_async and outputs:
            job.output_token_ids[-1] = -1
        job.is_refused = any(expert.name not in self.committed for expert, _ in job.terms)
        job.has_error = False
        self.runner.add(job)
        self.tally.events["admitted again" if outputs else "admitted"] += 1

    def apply(self) -> None:
        batch = self.batch
        for job in batch:  # with asynchronous scheduling the newest token arrives only now
            if job.output_token_ids:
                job.output_token_ids[-1] = job.script[job.num_tokens - 1]
        start = self.num_steps * 7 % (len(self.world.base_logits) - MAX_ROWS)
        base = self.world.base_logits[start : start + len(batch)].clone()
        for index, job in enumerate(batch):
            if job.operators.plausibility is not None:  # a sampler takes plausible tokens only
                base[index, job.next_token] = base[index].amax()
        counted = {index: job for index, job in enumerate(batch) if job.terms and not job.num_chunks}
        self.processor.forget_result()
        logits = self.processor.apply(base.clone())
        result = self.processor.result
        failed, steered = check_membership(result, counted)
        self.check_failures(failed, counted)
        assert not any(counted[index].is_refused for index in steered), "steered with a version that was not committed"
        places = list(steered)
        want = base.clone()
        want[places] = steered_rows([counted[index] for index in places], base[places], logits[places])
        is_close = torch.isclose(logits, want, atol=TOLERANCE, rtol=0.0).all(dim=1).tolist()
        is_base = (logits == base).all(dim=1).tolist()
        for index, job in enumerate(batch):
            is_right = is_close[index] if index in steered and job.factor else is_base[index]
            assert is_right, (index, job.uid, job.num_tokens)
        if result is not None:
            self.processor.records.observe(result, torch.tensor([job.next_token for job in batch]))
        for index, row in steered.items():
            self.count_steered(counted[index])
            counted[index].remember(base[index], want[index])
            if counted[index].operators.is_over(counted[index].num_outputs):
                assert not any(term.cache.blocks for term in row.terms), "nothing will read them again"
        self.tally.num_applies += 1
        self.num_steps += 1

    def count_steered(self, job: Job) -> None:
        events, operators = self.tally.events, job.operators
        events["steered"] += 1
        events["steered by several"] += len(job.terms) > 1
        events["outside its schedule"] += job.factor == 0
        events["plausible only"] += job.factor > 0 and operators.plausibility is not None
        events["capped"] += job.factor > 0 and operators.max_kl is not None

    def end_step(self, keeps_samples: bool) -> None:
        """What the runner does after sampling."""
        for job in self.batch:
            if job.num_chunks:
                job.num_chunks -= 1
                self.tally.events["discarded"] += 1
            elif keeps_samples:
                job.output_token_ids.append(-1 if self.is_async else job.next_token)
                job.num_outputs += 1
                if job.num_outputs >= job.max_outputs:
                    self.leaving[job] = 0

    # What must hold

    def check_failures(self, failed: dict[int, SteeredRow], counted: dict[int, Job]) -> None:
        """A row fails for a reason of its own: a version was not there, or it fits no pool."""
        for index, row in failed.items():
            job = counted[index]
            assert row.error, "a failed row says why"
            if job.is_refused:
                assert "is not loaded in this engine" in row.error
                self.tally.events["refused"] += 1
            elif not job.has_error:
                assert "out of adapter KV cache" in row.error
                needs = [expert.num_blocks(job.num_tokens) for expert, _ in job.terms]
                rooms = [term.expert.pool.capacity_tokens // BLOCK_SIZE for term in row.terms]
                assert any(need > room for need, room in zip(needs, rooms, strict=True)), "there is room for it"
                self.tally.events["out of cache"] += 1
            job.has_error = job.has_failed = True

    def check_accounting(self) -> None:
        committed = [expert.version for expert in self.world.experts if expert.name in self.committed]
        check_accounting(self.processor, self.batch, committed)

    def settle(self, job: Job) -> None:
        """A request has ended: take its record."""
        job.check_record(self.processor.records.take([job.uid]))

    @override
    def teardown(self) -> None:
        """Whatever was taken is given back."""
        if not self.is_sound:
            return
        while self.waiting:
            self.abort_while_waiting(0)
        self.leaving = dict.fromkeys(self.batch, 0)
        self.step(applies=False)
        residents = self.processor.residents
        for pool in residents._pools.values():
            assert pool.num_used == 0
            self.tally.events["tokens found by name"] += pool.counters.hit_tokens
            self.tally.events["tokens computed again"] += pool.counters.recomputed_tokens
        assert not self.processor.records._recordings
        for which in range(len(self.world.experts)):
            self.retire_version(which)
        assert residents.budget.allocated_bytes == 0
        assert not residents._pools


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_any_schedule_is_steered_like_the_plain_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are fixed at the default length, so that the verdict is always the same; longer searches draw new ones."""
    monkeypatch.setattr(residents_module, "read_adapter_lm", world.read_adapter_lm)
    monkeypatch.setattr(residents_module, "KvPool", functools.partial(KvPool, min_blocks=4))
    tally, fault = Tally(), ForwardFault()
    fault.inject(monkeypatch)
    run_state_machine_as_test(
        lambda: ScheduleMachine(world, tally, fault),  # type: ignore[arg-type]
        settings=settings(
            max_examples=NUM_STEPS // 69,
            stateful_step_count=STEPS_PER_EXAMPLE,
            derandomize=NUM_STEPS == DEFAULT_STEPS,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )
    assert fault.num_logged == fault.num_raised, "a forward pass failed that was not made to"
    tally.events["reading ahead failed"] = fault.num_raised
    print(tally)  # noqa: T201 - shown with -s
    assert tally.num_applies >= NUM_STEPS, tally
    rare = {event: count for event, count in tally.events.items() if count < NUM_STEPS // 500}
    assert not rare, "the search hardly ever met these"


def test_no_base_logit_of_the_world_is_near_a_plausibility_bound(world: World) -> None:
    """Else the reference in float64 and the engine in float32 could rightly differ in whether a token is plausible."""
    below_best = (world.base_logits.amax(dim=-1, keepdim=True) - world.base_logits).double()
    for fraction in (0.02, 0.3):
        assert float((below_best + np.log(fraction)).abs().min()) > 1e-5


def test_the_reference_notices_a_wrong_token_far_back(world: World) -> None:
    """Else agreement with it would mean little: siblings that differ in one early token differ in what follows."""
    for expert in world.experts:
        one, other = expert.table[0, 40], expert.table[1, 40]
        assert float((one - other)[:NUM_TOKENS].abs().max()) > 100 * TOLERANCE
