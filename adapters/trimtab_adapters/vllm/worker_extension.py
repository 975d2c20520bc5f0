"""Methods mixed into vLLM's worker, called by `collective_rpc` between two decoding steps.

Bound to `--worker-extension-cls` of vLLM 0.32.0: the class is added to the worker's bases, so its names carry a prefix
that collides with nothing. Answers cross msgpack, so they are plain dictionaries and lists. An exception would travel
as text only, so refusals are values: `{"error": {...}}`.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
import vllm

from trimtab_adapters.contract.engine_api import EngineStatus
from trimtab_adapters.contract.errors import AdapterError, TrimtabError
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.vllm.cpu_generators import replace_generators
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor
from trimtab_adapters.vllm.processor_v2 import SteeringProcessorV2
from trimtab_adapters.vllm.recording import RecordingSampler
from trimtab_adapters.vllm.recording_v2 import RecordingSamplerV2
from trimtab_adapters.vllm.shared_base import SharedBaseLM, share_base
from trimtab_adapters.vllm.shell import SteeringShell

logger = logging.getLogger(__name__)

_GUIDANCE_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Most nats between the base and itself under our attention, by type; a defect is off by whole nats."""

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TrimtabWorkerExtension:
    """Attach, prepare, commit, retire, status and records. All run on the worker's one thread."""

    if TYPE_CHECKING:
        model_runner: Any
        vllm_config: VllmConfig

    def _trimtab_processor(self) -> SteeringShell:
        runner = self.model_runner
        uses_v2 = self.vllm_config.use_v2_model_runner
        for processor in runner.sampler.logits_processors if uses_v2 else runner.input_batch.logitsprocs.all:
            if isinstance(processor, SteeringShell):
                return processor
        raise RuntimeError("the engine was started without Trimtab's logits processor")

    def trimtab_attach(self) -> dict[str, Any]:
        """Install the recording sampler and give the processor what only the runner knows. Idempotent."""
        processor, runner = self._trimtab_processor(), self.model_runner
        if runner.sampler.logprobs_mode != "raw_logprobs":
            raise RuntimeError("Trimtab needs --logprobs-mode raw_logprobs")
        if isinstance(processor, SteeringProcessorV2):
            _attach_v2(processor, runner)
            processor.base_lm = AdapterError("a negative prompt needs the V1 model runner: guidance has not run on V2")
        elif isinstance(processor, SteeringProcessor):
            _attach_v1(processor, runner)
            processor.base_lm = self._trimtab_base()
        return self.trimtab_status()

    def _trimtab_base(self) -> SharedBaseLM | AdapterError:
        runner = self.model_runner
        try:
            return share_base(runner.model, self.vllm_config, torch.device(runner.device))
        except AdapterError as exc:
            logger.info("no guidance by negative prompts: %s", exc.message)
            return exc

    def trimtab_check_guidance(self, uid: str) -> dict[str, Any]:
        """Judge the record of a request whose negative prompt was its own: base and negative must be the same.

        If they are not, requests with a negative prompt are refused from now on, with the difference as the reason.
        """
        processor = self._trimtab_processor()
        records = processor.records.take([uid])
        dtype = self.vllm_config.model_config.dtype
        reason = _guidance_defect(records[0] if records else None, _GUIDANCE_TOLERANCE.get(dtype, 0.3))
        if isinstance(processor, SteeringProcessor):
            processor.drop(uid)
        processor.drop_base_expert()
        if reason is not None:
            logger.warning("no guidance by negative prompts: %s", reason)
            processor.base_lm = AdapterError(f"this engine's base model cannot be its own expert: {reason}")
        return {"can_guide": reason is None}

    def trimtab_status(self) -> dict[str, Any]:
        """An `EngineStatus` as a dictionary."""
        processor, config = self._trimtab_processor(), self.vllm_config.model_config
        residents = processor.residents
        served = config.served_model_name
        return EngineStatus(
            boot_id=processor.boot_id,
            vllm_version=vllm.__version__,
            runner="v2" if isinstance(processor, SteeringProcessorV2) else "v1",
            model=served if isinstance(served, str) else (served or [config.model])[0],
            max_model_len=config.max_model_len,
            vocab_size=residents.base.vocab_size,
            vocabulary_sha256=residents.base.vocabulary_sha256,
            num_tokens=residents.base.num_tokens,
            versions=residents.versions(),
            cache=residents.cache_status(),
            weights=residents.weight_status(),
            can_guide=not isinstance(processor.base_lm, AdapterError),
            steered_rows=processor.core.num_rows,
            steered_steps=processor.core.num_steps,
            failed_rows=processor.core.num_failed,
        ).model_dump()

    def trimtab_prepare(self, version: VersionId, path: str) -> dict[str, Any]:
        """Start loading a version in a background thread; returns its state at once."""
        residents = self._trimtab_processor().residents
        residents.prepare(version, path)
        return residents.poll(version).model_dump()

    def trimtab_poll(self, version: VersionId) -> dict[str, Any]:
        """State of a version that is loading."""
        try:
            return self._trimtab_processor().residents.poll(version).model_dump()
        except TrimtabError as exc:
            return _refusal(exc)

    @torch.inference_mode()
    def trimtab_commit(self, version: VersionId) -> dict[str, Any]:
        """Make a prepared version usable from the next step on."""
        try:
            return self._trimtab_processor().residents.commit(version).model_dump()
        except TrimtabError as exc:
            return _refusal(exc)

    def trimtab_retire(self, version: VersionId) -> dict[str, Any]:
        """Refuse new rows for a version; free it now or with its last row."""
        active_rows = self._trimtab_processor().residents.retire(version)
        return {"version": version, "freed": active_rows == 0, "active_rows": active_rows}

    def trimtab_read(self, starts: dict[str, int]) -> list[dict[str, Any]]:
        """Copies of the records of running candidates, each from a token on."""
        return [record.model_dump() for record in self._trimtab_processor().records.read(starts)]

    def trimtab_take(self, uids: list[str]) -> list[dict[str, Any]]:
        """Remove and return the records of finished candidates."""
        return [record.model_dump() for record in self._trimtab_processor().records.take(uids)]


def _attach_v1(processor: SteeringProcessor, runner: Any) -> None:
    if not isinstance(runner.sampler, RecordingSampler):
        runner.sampler = RecordingSampler(runner.sampler, processor)
    processor.discarded = lambda num_rows: runner.discard_request_mask.np[:num_rows]
    # Computed before this step and scheduled in it; exact without speculative decoding.
    processor.computed = lambda num_rows: runner.optimistic_seq_lens_cpu[:num_rows].tolist()
    if runner.device.type == "cpu":
        processor.before_step = lambda: replace_generators(runner)


def _attach_v2(processor: SteeringProcessorV2, runner: Any) -> None:
    """Refuses what would sample past the recording sampler.

    Raises:
        RuntimeError: A request may have several rows in a step, or another sampler is in use.
    """
    if runner.decode_query_len != 1 or runner.rejection_sampler is not None or runner.batch_sharder is not None:
        raise RuntimeError("Trimtab needs one logits row per request: this model, or an option, samples otherwise")
    if not isinstance(runner.sampler, RecordingSamplerV2):
        runner.sampler = RecordingSamplerV2(runner.sampler, processor)
    processor.is_occupied = lambda slot: slot in runner.req_states.index_to_req_id


def _guidance_defect(record: SteeringRecord | None, tolerance: float) -> str | None:
    """What speaks against guidance after its trial; None when nothing does."""
    if record is None or not record.token_ids:
        return "its trial left no record"
    if record.status == "failed" or record.negative_logprobs is None:
        return record.error or "its trial was not guided"
    pairs = zip(record.base_logprobs, record.negative_logprobs, strict=True)
    error = max(math.inf if negative is None else abs(base - negative) for base, negative in pairs)
    return None if error <= tolerance else f"under another attention it differs from itself by {error:.3g} nats"


def _refusal(exc: TrimtabError) -> dict[str, Any]:
    return {
        "error": {"message": exc.message, "type": exc.type, "param": exc.param, "code": exc.code},
        "status": exc.status,
    }
