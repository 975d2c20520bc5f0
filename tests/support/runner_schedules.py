"""What a scheduler did, step by step, in JSON: recorded under one model runner, replayed under another.

```
{"requests": {"a": {"prompt": [5, 9, 33], "steered": true}, ...},
 "steps": [{"arrive": ["a"], "schedule": {"a": 3}},
           {"schedule": {"a": 1, "b": 16}, "arrive": ["b"], "preempt": ["c"], "finish": ["d"]},
           ...]}
```

In a step first `finish` and `preempt` leave, then `arrive` enters (for the first time, or again after preemption, with
all tokens so far), then `schedule` says how many tokens of each request are computed. A request in the middle of its
prefill is given fewer tokens than it has left; its sample does not count. Sampled ids are not part of a schedule: who
replays it samples for himself. An empty `schedule` is a step without tokens. `computed` says of requests that arrive
how many of their tokens are computed already, because the base's cache had them. `record_schedule.py` writes such
files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from simulated_v2_runner import SampledRow, SimulatedV2Engine
from trimtab_adapters.contract.params import SteeringParams


class ScheduledRequest(BaseModel):
    """A request as it arrived."""

    model_config = ConfigDict(extra="forbid")

    prompt: list[int]
    steered: bool = True


class Step(BaseModel):
    """One step; see the module."""

    model_config = ConfigDict(extra="forbid")

    finish: list[str] = Field(default_factory=list)
    preempt: list[str] = Field(default_factory=list)
    arrive: list[str] = Field(default_factory=list)
    schedule: dict[str, int] = Field(default_factory=dict)
    computed: dict[str, int] = Field(default_factory=dict)


class Schedule(BaseModel):
    """Requests and steps."""

    model_config = ConfigDict(extra="forbid")

    requests: dict[str, ScheduledRequest]
    steps: list[Step]


def read_schedule(path: Path) -> Schedule:
    return Schedule.model_validate_json(path.read_bytes())


def replay(
    schedule: Schedule,
    engine: SimulatedV2Engine,
    sampling: Callable[[str, bool], Any],
    check: Callable[[Step, list[SampledRow]], None],
) -> None:
    """Run a schedule.

    Args:
        schedule: What to run.
        engine: With enough slots.
        sampling: `SamplingParams` for a request by its name and whether it is steered.
        check: Called after each step.
    """
    for name, request in schedule.requests.items():
        engine.add(name, request.prompt, sampling(name, request.steered))
    for step in schedule.steps:
        rows = engine.step(
            step.schedule, arrive=step.arrive, finish=step.finish, preempt=step.preempt, computed=step.computed
        )
        check(step, rows)


@dataclass
class V1Step:
    """What a V1 processor saw in one step.

    Attributes:
        update: As given to `update_state`. Output lists in it are live, so they must be copied when it is recorded.
        discarded: For each row whether its sample was thrown away; None when `apply` was not called.
    """

    update: BatchUpdate | None
    discarded: Sequence[bool] | None


@dataclass(eq=False)
class _V1Request:
    """A request followed through V1's rows; `num_left` are tokens that are not computed yet."""

    name: str
    num_left: int = 0
    partial_steps: list[int] = field(default_factory=list)


def from_v1(steps: Sequence[V1Step]) -> Schedule:
    """The schedule behind what a V1 processor saw.

    V1 tells no token counts, so a prefill over k steps is split evenly. It does not tell preemption from a step in
    which a request is not scheduled; both become preemption, which is the harder case. Unsteered requests have no
    name, so one that comes back is taken for a new one whose prompt is all its tokens.
    """
    translation = _V1Translation()
    for step in steps:
        translation.add(step)
    return translation.finish()


class _V1Translation:
    """Rows of V1's batch over time, written down as a schedule."""

    def __init__(self) -> None:
        self.requests: dict[str, ScheduledRequest] = {}
        self.steps: list[Step] = []
        self._rows: dict[int, _V1Request] = {}
        self._gone: list[tuple[int, str]] = []

    def add(self, step: V1Step) -> None:
        made, number = Step(), len(self.steps)
        self.steps.append(made)
        if step.update is not None:
            before = list(self._rows.values())
            made.arrive = self._move(step.update)
            for request in before:
                if request not in self._rows.values():
                    self._gone.append((number, request.name))
                    for place in request.partial_steps:  # how much of a prefill that was broken off: nobody knows
                        self.steps[place].schedule[request.name] = 1
        for index, is_discarded in enumerate(step.discarded or ()):
            request = self._rows[index]
            if is_discarded:
                request.partial_steps.append(number)
            else:
                self._close_prefill(request, number)

    def _move(self, update: BatchUpdate) -> list[str]:
        """Follow the rows; returns the names that were added."""
        arrived: list[str] = []
        for index in update.removed:
            self._rows.pop(index, None)
        for index, sampling_params, prompt, outputs in update.added:
            params = SteeringParams.from_extra_args(sampling_params.extra_args)
            is_steered = params is not None and bool(params.active)
            tokens = [*(prompt or ()), *outputs]
            name = params.uid if params is not None and is_steered else f"unsteered-{len(self.requests)}"
            prompt_here = list(prompt or ()) if is_steered else tokens
            self.requests.setdefault(name, ScheduledRequest(prompt=prompt_here, steered=is_steered))
            self._rows[index] = _V1Request(name, num_left=len(tokens))
            arrived.append(name)
        for source, target, direction in update.moved:
            moving, standing = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if standing is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = standing
        return arrived

    def _close_prefill(self, request: _V1Request, number: int) -> None:
        """A sample that counts: the tokens that were left are spread over this step and the partial ones before."""
        left = request.num_left
        steps = [*request.partial_steps, number]
        for place, step in enumerate(steps):
            share = left // (len(steps) - place)
            self.steps[step].schedule[request.name] = share
            left -= share
        request.num_left, request.partial_steps = 1, []

    def finish(self) -> Schedule:
        """Who left and came back was preempted, who did not has finished."""
        for number, name in self._gone:
            returns = any(name in step.arrive for step in self.steps[number:])
            (self.steps[number].preempt if returns else self.steps[number].finish).append(name)
        return Schedule(requests=self.requests, steps=self.steps)
