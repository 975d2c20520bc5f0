"""Writes down what a real V1 engine schedules, for `runner_schedules` to replay: few blocks, chunks, aborts, steering.

    python tests/support/record_schedule.py tests/unit/adapters/schedules/recorded_v1.json

Repeatable: prompts, arrivals and aborts come from a seed, and the engine runs in this process, step by step. The steps
are the scheduler's own; the rows that the processor was told to leave alone are compared with them, so that what is
recorded is what a processor sees.
"""

import os
import random
import sys
import tempfile
import time
from json import dumps
from pathlib import Path
from typing import Any

from engine_process import engine_environment

NUM_REQUESTS = 24
ABORTED = (5, 11, 17)
"""Requests that are aborted a few steps after they arrived."""


def main(path: Path) -> None:
    """Record into a file."""
    os.environ.update(engine_environment(), VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0")
    os.environ.update(VLLM_PLUGINS="", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    from tiny_models import make_tiny_models

    with tempfile.TemporaryDirectory() as root:
        models = make_tiny_models(Path(root))
        recorder = Recorder(build_engine(models.base))
        recorder.load(models.manifest("adapter").version_id, models.adapter)
        recorder.run(models.manifest("adapter").version_id)
    path.write_text(recorder.json())


def build_engine(model: Path) -> Any:
    """Four rows, 24 tokens a step, and five blocks of 32 for all of them."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = EngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        block_size=32,
        num_gpu_blocks_override=6,
        async_scheduling=False,
        disable_log_stats=True,
        logits_processors=["trimtab_adapters.vllm.processor_v1:SteeringProcessor"],
        worker_extension_cls="trimtab_adapters.vllm.worker_extension.TrimtabWorkerExtension",
    )
    engine: Any = LLMEngine.from_engine_args(arguments)
    engine.collective_rpc("trimtab_attach")
    return engine


class Recorder:
    """Drives an engine of this process and keeps what its scheduler hands to the model runner."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.requests: dict[str, dict[str, Any]] = {}
        self.steps: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}
        self._in_runner: set[str] = set()
        self._left: dict[str, int] = {}
        core = engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self._processor = list(runner.input_batch.logitsprocs.all)[-1]
        self._schedule, core.scheduler.schedule = core.scheduler.schedule, self._watch_schedule
        self._apply, self._processor.apply = self._processor.apply, self._watch_apply

    def load(self, version: str, directory: Path) -> None:
        """Commit an adapter version."""
        self.engine.collective_rpc("trimtab_prepare", args=(version, str(directory)))
        while self.engine.collective_rpc("trimtab_poll", args=(version,))[0]["state"] == "loading":
            time.sleep(0.01)
        assert self.engine.collective_rpc("trimtab_commit", args=(version,))[0]["state"] == "committed"

    def run(self, version: str) -> None:
        """Random arrivals until everything has ended."""
        rng = random.Random(12)
        num_sent, number = 0, 0
        abort_at: dict[int, str] = {}
        while num_sent < NUM_REQUESTS or self.engine.has_unfinished_requests():
            number += 1
            while num_sent < NUM_REQUESTS and rng.random() < 0.4:
                name = self._send(num_sent, version, rng)
                if num_sent in ABORTED:
                    abort_at[number + rng.randrange(2, 12)] = name
                num_sent += 1
            if number in abort_at:
                self.engine.abort_request([abort_at[number]])
            self.engine.step()
        self.steps.append({"finish": sorted(self._in_runner)})

    def _send(self, number: int, version: str, rng: random.Random) -> str:
        from vllm import SamplingParams

        from steering_reference import params

        name = f"r{number}"
        prompt = [rng.randrange(1, 128) for _ in range(rng.choice([1, 5, 20, 33, 64, 70]))]
        if number % 5 == 4:  # the same beginning as another, so that the base finds its blocks by name
            prompt = (self.requests[f"r{number - 2}"]["prompt"] + prompt)[:70]
        steering = dict(params(name, (version, 1.0)).to_xargs()) if number % 4 else None
        self.requests[name] = {"prompt": prompt} | ({} if steering else {"steered": False})
        sampling = SamplingParams(
            temperature=0, logprobs=0, max_tokens=rng.randrange(1, 50), ignore_eos=True, extra_args=steering
        )
        added: str = self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return added

    def _watch_schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        step: dict[str, Any] = {}
        step["finish"] = self._leave(output.finished_req_ids)
        step["preempt"] = self._leave(output.preempted_req_ids or ())
        cached = output.scheduled_cached_reqs
        arrived = [
            (new.req_id, new.num_computed_tokens, len(new.prompt_token_ids)) for new in output.scheduled_new_reqs
        ]
        for number, name in enumerate(cached.req_ids):
            if name in cached.resumed_req_ids:
                total = len(cached.all_token_ids[name])
                arrived.append((name, cached.num_computed_tokens[number], total))
        step["arrive"] = [self._name(req_id) for req_id, _, _ in arrived]
        step["computed"] = {self._name(req_id): computed for req_id, computed, _ in arrived if computed}
        step["schedule"] = {self._name(req_id): count for req_id, count in output.num_scheduled_tokens.items()}
        self._in_runner |= set(step["arrive"])
        self._left |= {self._name(req_id): total - computed for req_id, computed, total in arrived}
        for name, count in step["schedule"].items():
            self._left[name] -= count
        self.steps.append({key: value for key, value in step.items() if value or key == "schedule"})
        return output

    def _leave(self, req_ids: Any) -> list[str]:
        names = sorted({self._name(req_id) for req_id in req_ids} & self._in_runner)
        self._in_runner -= set(names)
        return names

    def _name(self, req_id: str) -> str:
        """The name that a request was sent under; vLLM adds something of its own."""
        return self._names.setdefault(req_id, req_id.partition("-")[0])

    def _watch_apply(self, logits: Any) -> Any:
        discarded = self._processor.discarded(logits.shape[0])
        for index, occupant in self._processor._occupants.items():
            name = occupant.row.params.uid
            assert bool(discarded[index]) == (self._left[name] > 0), f"{name}: the recording is not what vLLM does"
        for name in self.steps[-1]["schedule"]:
            self._left[name] = self._left[name] or 1  # the token that is sampled now
        return self._apply(logits)

    def json(self) -> str:
        """One line for each request and step."""
        requests = ",\n".join(f"  {dumps(name)}: {dumps(request)}" for name, request in self.requests.items())
        steps = ",\n".join(f"  {dumps(step)}" for step in self.steps)
        return f'{{"requests": {{\n{requests}\n}},\n"steps": [\n{steps}\n]}}\n'


if __name__ == "__main__":
    main(Path(sys.argv[1]))
