"""What Trimtab relies on in Model Runner V2 of vLLM 0.32.0, read from the installed source.

V2 does not run on a CPU, so an upgrade of vLLM that moves the ground would be seen on a GPU only, or here. A failure
names what has changed: read vLLM's new source, change `trimtab_adapters/vllm` where needed, then this file.
"""

import ast
import hashlib
import importlib.util
import inspect
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

GPU = "v1/worker/gpu"
RUNNER = f"{GPU}/model_runner.py"
SAMPLER = f"{GPU}/sample/sampler.py"


@cache
def parsed(file: str) -> tuple[str, ast.Module]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / file).read_text()
    return text, ast.parse(text)


def source(file: str, name: str) -> str:
    """Text of a function or `Class.method`; fails when vLLM has none of that name."""
    text, node = parsed(file)
    found: ast.AST = node
    for part in name.split("."):
        matches = [
            child
            for child in ast.iter_child_nodes(found)
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == part
        ]
        assert matches, f"vllm/{file} has no {name} any more"
        found = matches[-1]
    segment = ast.get_source_segment(text, found)
    assert segment is not None
    return segment


def assert_in_order(file: str, name: str, *pieces: str) -> None:
    text, place = source(file, name), 0
    for piece in pieces:
        found = text.find(piece, place)
        assert found >= 0, f"vllm/{file}, {name}: `{piece}` is gone or comes earlier than it did"
        place = found


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("__init__", ["self", "vllm_config", "req_states"]),
        ("validate_params", ["sampling_params"]),
        ("add_request", ["self", "req_idx", "sampling_params"]),
        ("apply_staged_writes", ["self"]),
        ("apply", ["self", "logits", "ctx"]),
    ],
)
def test_a_processor_has_the_methods_that_we_override(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(LogitsProcessor, method)).parameters) == parameters


def test_a_processor_has_no_hook_that_we_do_not_know() -> None:
    """One that tells of removals would replace our look into the runner's table."""
    hooks = {name for name in vars(LogitsProcessor) if not name.startswith("_")}
    assert hooks == {"validate_params", "add_request", "apply_staged_writes", "apply"}


def test_a_processor_is_given_what_we_read() -> None:
    assert {"device", "all_token_ids", "prompt_len", "prefill_len"} <= {f.name for f in fields(LogitsProcRequestState)}
    assert {"idx_mapping_np", "expanded_idx_mapping", "input_ids", "seq_lens_upper_bound_np"} <= {
        f.name for f in fields(LogitsContext)
    }


def test_requests_leave_before_others_enter_and_both_before_a_step_without_tokens_ends() -> None:
    assert_in_order(
        RUNNER,
        "GPUModelRunner.execute_model",
        "self.finish_requests(scheduler_output)",
        "self.add_requests(scheduler_output)",
        "self.update_requests(scheduler_output)",
        "if scheduler_output.total_num_scheduled_tokens == 0:",
    )


def test_a_slot_is_in_the_runners_table_before_the_processor_hears_of_it_and_writes_are_applied_in_every_step() -> None:
    assert_in_order(
        RUNNER,
        "GPUModelRunner.add_requests",
        "self.req_states.add_request(",
        "self.sampler.add_request(req_index, new_req_data.sampling_params)",
        "\n        if scheduler_output.scheduled_new_reqs:\n            self.req_states.apply_staged_writes()",
        "\n        if self.sampler is not None:\n            self.sampler.apply_staged_writes()",
    )


def test_removal_is_not_announced_and_takes_the_request_out_of_the_table() -> None:
    assert "sampler" not in source(RUNNER, "GPUModelRunner._remove_request"), "it is now: use it"
    assert_in_order(
        f"{GPU}/states.py",
        "RequestState.remove_request",
        "self.index_to_req_id.pop(req_idx, None)",
        "self.free_indices.append(req_idx)",
    )
    assert "finished_req_ids.union(preempted_req_ids)" in source(RUNNER, "GPUModelRunner.finish_requests")


def test_the_sampler_is_an_attribute_that_is_called_and_its_answer_is_copied_after_it_returned() -> None:
    assert "sampler_output = self.sampler(logits, input_batch)" in source(RUNNER, "GPUModelRunner.sample")
    assert_in_order(
        RUNNER,
        "GPUModelRunner.sample_tokens",
        "sampler_output, num_sampled, num_rejected = self.sample(",
        "async_output = AsyncOutput(",
        "self.postprocess_sampled(",
    )
    assert_in_order(SAMPLER, "Sampler.__call__", "logits: torch.Tensor,\n", "input_batch: InputBatch,\n    ) ->")


def test_what_attaching_asks_of_the_runner_is_there() -> None:
    text = parsed(RUNNER)[0]
    for name in ("decode_query_len", "rejection_sampler", "batch_sharder", "req_states", "sampler"):
        assert f"self.{name} = " in text or f"self.{name}: " in text, f"GPUModelRunner has no {name} any more"
    assert "sampling_params.logprobs" in source(f"{GPU}/sample/states.py", "SamplingStates.add_request")
    assert_in_order(
        SAMPLER, "Sampler.__init__", "self.logprobs_mode = ", "self.logits_processors", "self.logprob_token_ids_state"
    )
    assert "return num_logprobs, max_token_ids" in source(SAMPLER, "Sampler.get_logprobs_dims")
    assert "self.num_token_ids = UvaBackedTensor" in source(f"{GPU}/sample/logprob.py", "LogprobTokenIdsState.__init__")


def test_custom_processors_come_after_bias_penalties_and_bad_words_and_before_temperature() -> None:
    assert_in_order(
        SAMPLER,
        "Sampler.__init__",
        "logit_bias_state,\n",
        "self.penalties_state,\n",
        "bad_words_state,\n",
        "*custom_logits_processors,\n",
    )
    assert_in_order(
        SAMPLER,
        "Sampler.apply_sampling_params",
        "if not np.any(self.needs_logits_processing[idx_mapping_np]):",
        "torch.empty_like(logits, dtype=torch.float32).copy_(logits)",
        "for processor in self.logits_processors:",
        "self.thinking_budget_state.apply(",
        "self.sampling_states.apply_temperature(",
    )


def test_returned_logprobs_are_computed_from_logits_that_no_processor_has_changed() -> None:
    assert_in_order(
        SAMPLER,
        "Sampler.__call__",
        "sampled, processed_logits = self.sample(\n            logits,",
        "if self.logprobs_mode in PROCESSED_LOGPROBS_MODES:\n                logits = processed_logits",
        "logprobs_tensors = compute_topk_scores(\n                logits,",
        "sampled_token_ids=sampled.view(-1, 1)",
    )


def test_a_partial_prefill_is_told_by_its_length_on_the_host() -> None:
    assert "is_chunked_prefilling = seq_len < prefill_len" in source(
        f"{GPU}/input_batch.py", "_get_num_sampled_and_rejected_kernel"
    )
    assert_in_order(
        RUNNER,
        "GPUModelRunner.prepare_inputs",
        "num_computed_tokens_np = self.req_states.num_computed_tokens_np[idx_mapping_np]",
        "seq_lens_cpu_upper_bound = torch.from_numpy(seq_lens_cpu_upper_bound_np)",
    )
    assert "seq_lens_upper_bound_np = input_batch.seq_lens_cpu_upper_bound.numpy()" in source(
        SAMPLER, "Sampler.__call__"
    )


def test_warm_up_requests_carry_no_extra_args() -> None:
    assert SamplingParams.for_sampler_warmup().extra_args is None


def test_the_runner_is_chosen_by_the_property_that_we_ask() -> None:
    assert "self.use_v2_model_runner = vllm_config.use_v2_model_runner" in parsed("v1/worker/gpu_worker.py")[0]
    assert "envs.VLLM_USE_V2_MODEL_RUNNER" in source("config/vllm.py", "VllmConfig.use_v2_model_runner")
    assert "return bool(int(value))" in source("envs.py", "maybe_convert_bool"), "other values than 0 and 1 are allowed"


KERNELS = {
    (f"{GPU}/buffer_utils.py", "_apply_write_kernel"): "edffb7c0f61ea1e1",
    (f"{GPU}/input_batch.py", "_prepare_prefill_inputs_kernel"): "f5a1f618eb973e63",
    (f"{GPU}/input_batch.py", "_prepare_pos_seq_lens_kernel"): "0ace2567b64057a1",
    (f"{GPU}/input_batch.py", "_combine_sampled_and_draft_tokens_kernel"): "fb3184471c24ac62",
    (f"{GPU}/input_batch.py", "_get_num_sampled_and_rejected_kernel"): "7606589a6d98206f",
    (f"{GPU}/input_batch.py", "_post_update_kernel"): "fc8ec4ada5953ead",
    (f"{GPU}/sample/logprob.py", "_ranks_kernel"): "8248ef7ecf2feadd",
    (f"{GPU}/sample/logprob.py", "_fill_logprob_token_ids_kernel"): "587d1c4738b365c9",
    (f"{GPU}/sample/logprob.py", "compute_token_logprobs"): "5a78ca8bcf54f474",
}
"""Hashes of what `tests/support/v2_kernels_on_cpu.py` stands for."""


@pytest.mark.parametrize(("file", "name"), KERNELS)
def test_a_kernel_that_the_simulated_runner_replaces_is_the_one_that_was_read(file: str, name: str) -> None:
    found = hashlib.sha256(source(file, name).encode()).hexdigest()[:16]
    assert found == KERNELS[file, name], f"vllm/{file}: {name} has changed; compare tests/support/v2_kernels_on_cpu.py"
