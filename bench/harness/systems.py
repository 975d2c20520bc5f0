"""The systems that are compared, each in a process of its own that waits quietly while another one is measured.

A vLLM system is a `LLMEngine` in the process itself (no engine-core process, which would poll at full speed while
idle), stepped by hand, so that one step is what is timed. All systems answer the same `Work`.
"""

import multiprocessing as mp
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Kind = Literal["vllm", "steered", "per_row", "hf_loop"]


@dataclass(frozen=True, slots=True)
class System:
    """What to start: a vLLM engine, one with steering, one with the simple processor, or the plain loop."""

    kind: Kind
    model: Path
    adapters: tuple[Path, ...] = ()
    max_num_seqs: int = 32
    max_model_len: int = 4096
    max_num_batched_tokens: int = 2048
    kv_gib: int = 3
    adapter_kv_bytes: int = 2 << 30
    num_threads: int = 2


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts to continue for a fixed number of tokens.

    Attributes:
        prompts: Token ids.
        num_tokens: New tokens of each.
        steerings: For each prompt the (index of adapter, alpha) terms; empty leaves the row unsteered.
        record: Whether steered rows keep their log-probabilities.
        fresh: Forget cached prefixes first.
        temperature: 0 is greedy decoding.
    """

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int
    steerings: tuple[tuple[tuple[int, float], ...], ...] = ()
    record: bool = True
    fresh: bool = False
    temperature: float = 0.0


@dataclass(slots=True)
class Timing:
    """What a system did.

    Attributes:
        first_s: Seconds from the start to the first token of the last request.
        step_s: Seconds of each step after that.
        peak_bytes: Resident memory of the process at its highest so far.
        status: The steering engine's own counters.
    """

    first_s: float
    step_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def step_ms(self) -> float:
        """Median of a decoding step, in milliseconds."""
        return statistics.median(self.step_s) * 1e3


class Worker:
    """A system in a child process."""

    def __init__(self, system: System) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(system, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Block until the system is up."""
        self._receive()

    def run(self, work: Work) -> Timing:
        """Do the work and say how long it took."""
        self._pipe.send(work)
        timing = self._receive()
        assert isinstance(timing, Timing)
        return timing

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"a system ended with exit status {self._process.exitcode}; see its output") from None

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(system: System, pipe: Connection) -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE=str(system.kv_gib),
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_NO_USAGE_STATS="1",
        TORCHDYNAMO_DISABLE="1",
        OMP_NUM_THREADS=str(system.num_threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_PLUGINS="",
        HF_HUB_OFFLINE="1",
    )
    import torch

    torch.set_num_threads(system.num_threads)
    if system.kind == "hf_loop":
        from harness.hf_loop import HfLoop

        runner: Any = HfLoop(system)
    else:
        runner = VllmRunner(system)
    pipe.send("ready")
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        timing = runner.run(work)
        timing.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(timing)


class VllmRunner:
    """A stock engine, with or without one of the two processors."""

    def __init__(self, system: System) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        options: dict[str, Any] = {}
        if system.kind == "steered":
            options = {
                "logits_processors": ["trimtab_adapters.vllm.processor_v1:SteeringProcessor"],
                "worker_extension_cls": "trimtab_adapters.vllm.worker_extension.TrimtabWorkerExtension",
                "additional_config": {"trimtab": {"kv_bytes": system.adapter_kv_bytes}},
            }
        elif system.kind == "per_row":
            os.environ["TRIMTAB_BENCH_ADAPTER"] = str(system.adapters[0])
            options = {"logits_processors": ["harness.per_row:PerRowProcessor"]}
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(system.model),
                enforce_eager=True,
                max_model_len=system.max_model_len,
                max_num_seqs=system.max_num_seqs,
                max_num_batched_tokens=system.max_num_batched_tokens,
                disable_log_stats=True,
                **options,
            )
        )
        self.versions: list[str] = []
        self._is_steered = system.kind == "steered"
        self._number = 0
        if self._is_steered:
            self.call("trimtab_attach")
            for directory in system.adapters:
                self.versions.append(self._load(directory))

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the worker extension."""
        return self.engine.collective_rpc(method, args=arguments)[0]

    def _load(self, directory: Path) -> str:
        from trimtab_adapters.contract.manifest import read_manifest

        version = read_manifest(directory).version_id
        self.call("trimtab_prepare", version, str(directory))
        while (state := self.call("trimtab_poll", version))["state"] == "loading":
            time.sleep(0.05)
        if state["state"] == "failed":
            raise RuntimeError(state["error"])
        self.call("trimtab_commit", version)
        return version

    def params(self, work: Work, steering: Sequence[tuple[int, float]], uid: str) -> Any:
        """vLLM's sampling parameters of one row of the work."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from trimtab_adapters.contract.params import AdapterWeight, SteeringParams

        steered: dict[str, Any] = {}
        if steering:
            weights = [AdapterWeight(name=f"a{index}", version=self.versions[index], alpha=a) for index, a in steering]
            params = SteeringParams(uid=uid, adapters=weights, record=work.record)
            steered = {"logprobs": 0, "extra_args": dict(params.to_xargs())}
        return SamplingParams(
            temperature=work.temperature,
            max_tokens=work.num_tokens,
            min_tokens=work.num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **steered,
        )

    def run(self, work: Work) -> Timing:
        engine = self.engine
        if work.fresh:
            engine.reset_prefix_cache()
        steerings = work.steerings or ((),) * len(work.prompts)
        uids: list[str] = []
        started = time.perf_counter()
        for prompt, steering in zip(work.prompts, steerings, strict=True):
            self._number += 1
            uids.append(f"r{self._number}")
            params = self.params(work, steering, uids[-1])
            engine.add_request(uids[-1], {"prompt_token_ids": list(prompt)}, params)
        waiting = set(uids)
        steps: list[float] = []
        first = 0.0
        while engine.has_unfinished_requests():
            before = time.perf_counter()
            outputs = engine.step()
            now = time.perf_counter()
            if waiting:
                waiting -= {output.request_id.split("-")[0] for output in outputs}
                first = now - started
            else:
                steps.append(now - before)
        status = self._finish(uids, [bool(s) for s in steerings], work)
        return Timing(first_s=first, step_s=steps, status=status)

    def _finish(self, uids: list[str], is_steered: list[bool], work: Work) -> dict[str, Any]:
        """Take the records, as the gateway would, and see that every steered row was steered."""
        if not self._is_steered:
            return {}
        asked = [uid for uid, steered in zip(uids, is_steered, strict=True) if steered]
        records = self.call("trimtab_take", asked)
        bad = [r for r in records if r["status"] != "ok" or r["num_tokens"] != work.num_tokens]
        if len(records) != len(asked) or bad:
            raise RuntimeError(f"{len(asked)} steered rows, {len(records)} records, bad: {bad[:1]}")
        status: dict[str, Any] = self.call("trimtab_status")
        return status
