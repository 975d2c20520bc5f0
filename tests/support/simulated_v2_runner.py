"""Model Runner V2 of vLLM 0.32.0 on a CPU, without a model: its host code is vLLM's own, its kernels are stand-ins.

Slots, batches, inputs, the sampler and the order of calls to a logits processor come from `GPUModelRunner`,
`RequestState` and `Sampler` themselves. Simulated are the scheduler (the test says what is scheduled), the model (base
logits are a function of the newest token and its position) and the kernels (`v2_kernels_on_cpu`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

CPU = torch.device("cpu")
MAX_MODEL_LEN = 256


@dataclass(eq=False)
class SimulatedRequest:
    """What the scheduler knows of a request."""

    name: str
    prompt: list[int]
    sampling_params: SamplingParams
    outputs: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.outputs


@dataclass(frozen=True)
class SampledRow:
    """One row of a step.

    Attributes:
        name: Of its request.
        tokens: All that the model had seen of the request in this step.
        counts: Whether its sample counts; False in the middle of a prefill.
        base: `[V]` logits of the model.
        processed: `[V]` logits that were sampled from.
        token_id: What was sampled.
        index: Its row.
    """

    name: str
    tokens: list[int]
    counts: bool
    base: Tensor
    processed: Tensor
    token_id: int
    index: int


class SimulatedModel:
    """Base logits `[rows, V]` from hidden states `[rows, 2]`, which are the newest token and its position."""

    def __init__(self, vocab_size: int) -> None:
        self.table = torch.randn(97, vocab_size, generator=torch.Generator().manual_seed(7)) * 3

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.table[(hidden[:, 0] * 31 + hidden[:, 1] * 7) % len(self.table)].clone()


class SimulatedV2Runner(GPUModelRunner):  # type: ignore[misc] # vLLM's classes are untyped here
    """A runner whose constructor makes only what its host code touches.

    Args:
        build: Makes the processor under test from vLLM's `LogitsProcRequestState`.
    """

    def __init__(self, build: Callable[[Any], Any], *, vocab_size: int, max_num_reqs: int = 4) -> None:
        self.device = CPU
        self.vocab_size, self.max_num_reqs, self.decode_query_len = vocab_size, max_num_reqs, 1
        self.req_states = RequestState(max_num_reqs, MAX_MODEL_LEN, 512, 0, vocab_size, CPU)
        self.input_buffers = InputBuffers(max_num_reqs, 512, CPU)
        self.processor = build(LogitsProcRequestState.from_request_state(self.req_states))
        self.sampler = Sampler(
            SimpleNamespace(reasoning_config=None),
            max_num_reqs=max_num_reqs,
            vocab_size=vocab_size,
            device=CPU,
            req_states=self.req_states,
            custom_logits_processors=[self.processor],
        )
        self.last_processed = torch.empty(0)
        sample_random = self.sampler._sample_random

        def keep_and_sample(processed: Tensor, *arguments: Any) -> Any:
            self.last_processed = processed.clone()
            return sample_random(processed, *arguments)

        self.sampler._sample_random = keep_and_sample
        self.model = SimulatedModel(vocab_size)
        self.model_config = SimpleNamespace(rswa_window=None)
        anything = SimpleNamespace(
            add_request=lambda *_: None,
            remove_request=lambda *_: None,
            apply_staged_writes=lambda: None,
            append_block_ids=lambda *_, **__: None,
            postprocess_state=lambda *_: None,
            num_new_sampled_tokens_per_step=1,
        )
        self.model_state = self.block_tables = self.prompt_logprobs_worker = self.lora_state = anything
        self.structured_outputs_worker = SimpleNamespace(apply_grammar_bitmask=self._apply_grammar)
        self.is_last_pp_rank, self.use_pp = True, False
        for name in ("pooling_runner", "pp_handler", "encoder_cache", "adaptive_verification", "pcp_manager"):
            setattr(self, name, None)
        for name in ("fast_prefill", "kv_block_zeroer", "batch_sharder", "rejection_sampler"):
            setattr(self, name, None)

    def _apply_grammar(
        self, logits: Tensor, batch: Any, names: Sequence[str], allowed: Mapping[str, list[int]]
    ) -> None:
        for name in names:
            kept = torch.tensor(allowed[name])
            row = logits[batch.req_ids.index(name)]
            row.copy_(torch.full_like(row, -torch.inf).index_copy(0, kept, row[kept]))

    @torch.inference_mode()
    def run(self, output: SchedulerOutput, grammar: Any = None) -> tuple[Any, Any] | None:
        """`execute_model` and `sample_tokens`; returns vLLM's input batch and sampler output, None without tokens."""
        self.finish_requests(output)
        self.add_requests(output)
        self.update_requests(output)
        if output.total_num_scheduled_tokens == 0:
            return None
        state, _ = self.gather_batch_req_state(output, False)
        graph = SimpleNamespace(num_tokens=0, num_reqs=None)
        batch = self.prepare_inputs(output, state, graph, 0)
        hidden = torch.stack((batch.input_ids.long(), batch.positions), dim=-1)
        sampled, num_sampled, num_rejected = self.sample(hidden, batch, grammar)
        self.postprocess_sampled(
            batch.idx_mapping, sampled.sampled_token_ids, num_sampled, num_rejected, batch.query_start_loc
        )
        return batch, sampled


class SimulatedV2Engine:
    """A scheduler that does what it is told, over a runner."""

    def __init__(self, runner: SimulatedV2Runner) -> None:
        self.runner = runner
        self.requests: dict[str, SimulatedRequest] = {}
        self.last_output: Any = None

    def slot(self, name: str) -> int:
        """The slot of a request that is in the runner."""
        slot: int = self.runner.req_states.req_id_to_index[name]
        return slot

    def add(self, name: str, prompt: Sequence[int], sampling_params: SamplingParams) -> None:
        """Make a request known; it enters the runner by `arrive`."""
        self.requests[name] = SimulatedRequest(name, list(prompt), sampling_params)

    def step(
        self,
        schedule: Mapping[str, int],
        *,
        arrive: Sequence[str] = (),
        finish: Sequence[str] = (),
        preempt: Sequence[str] = (),
        computed: Mapping[str, int] | None = None,
        allowed: Mapping[str, list[int]] | None = None,
    ) -> list[SampledRow]:
        """One step. `arrive` names requests that are new or back after preemption; all of them must be scheduled.

        `computed` says how many tokens of an arriving request the base's prefix cache holds.
        """
        for name in preempt:
            self.requests[name].num_computed = 0
        for name, num_computed in (computed or {}).items():
            self.requests[name].num_computed = num_computed
        grammar = None
        if allowed is not None:
            grammar = SimpleNamespace(
                structured_output_request_ids=list(allowed), grammar_bitmask=allowed, num_acceptable_drafts=None
            )
        ran = self.runner.run(self._output(schedule, arrive, finish, preempt), grammar)
        rows: list[SampledRow] = []
        if ran is None:
            return rows
        batch, self.last_output = ran
        processed = self.runner.last_processed
        for index, name in enumerate(batch.req_ids):
            request = self.requests[name]
            request.num_computed += schedule[name]
            seen = request.tokens[: request.num_computed]
            counts = request.num_computed >= len(request.tokens)
            assert int(self.last_output.num_sampled[index]) == int(counts), "vLLM and the simulation disagree"
            position = torch.tensor([[seen[-1], len(seen) - 1]])
            token_id = int(self.last_output.sampled_token_ids[index, 0])
            rows.append(
                SampledRow(
                    name, seen, counts, self.runner.model.compute_logits(position)[0], processed[index], token_id, index
                )
            )
            if counts:
                request.outputs.append(token_id)
        return rows

    def _output(
        self, schedule: Mapping[str, int], arrive: Sequence[str], finish: Sequence[str], preempt: Sequence[str]
    ) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, output.preempted_req_ids = set(finish), set(preempt)
        output.num_scheduled_tokens = dict(schedule)
        output.total_num_scheduled_tokens = sum(schedule.values())
        for name in arrive:
            request = self.requests[name]
            output.scheduled_new_reqs.append(
                NewRequestData(
                    req_id=name,
                    prompt_token_ids=request.prompt,
                    mm_features=[],
                    sampling_params=request.sampling_params,
                    pooling_params=None,
                    block_ids=(),
                    num_computed_tokens=request.num_computed,
                    lora_request=None,
                    prefill_token_ids=request.tokens,
                )
            )
        known = [name for name in schedule if name not in arrive]
        cached = CachedRequestData.make_empty()
        cached.req_ids = known
        cached.num_computed_tokens = [self.requests[name].num_computed for name in known]
        cached.new_block_ids = [None] * len(known)
        output.scheduled_cached_reqs = cached
        return output
