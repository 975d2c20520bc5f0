"""What Model Runner V2 of vLLM 0.32.0 runs on a GPU, in plain PyTorch on the CPU.

Only the device side is replaced: Triton kernels and memory that host and device share. The host code around them, which
decides about slots, rows and lengths, stays vLLM's own. Each function stands for the kernel of the same name and takes
its arguments; `tests/contract/test_vllm_v2_interface.py` fails when a kernel's source changes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.worker.gpu import buffer_utils, model_runner
from vllm.v1.worker.gpu.sample import logprob, sampler


class SharedBuffer:
    """`UvaBuffer` without pinned memory: on a CPU host and device see the same memory anyway."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()

    def uva(self, n: int | None = None) -> Tensor:
        return self.cpu[:n] if n is not None else self.cpu


class Kernel:
    """Called like a Triton kernel, `kernel[grid](...)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.function


def apply_write(
    output: Tensor, stride: int, indices: Tensor, starts: Tensor, contents: Tensor, ends: Tensor, *_: Any, **__: Any
) -> None:
    flat, begin = output.view(-1), 0
    for index, start, end in zip(indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        place = index * stride + start
        flat[place : place + end - begin] = contents[begin:end]
        begin = end


def prepare_prefill_inputs(
    input_ids: Tensor,
    next_prefill_tokens: Tensor,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    all_token_ids: Tensor,
    prefill_len: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    for row, slot in enumerate(idx_mapping.tolist()):
        computed, (start, end) = int(num_computed_tokens[slot]), query_start_loc[row : row + 2].tolist()
        if computed < int(prefill_len[slot]):
            input_ids[start:end] = all_token_ids[slot, computed : computed + end - start]


def prepare_pos_seq_lens(
    idx_mapping: Tensor, query_start_loc: Tensor, num_computed_tokens: Tensor, pos: Tensor, seq_lens: Tensor
) -> None:
    seq_lens.zero_()
    for row, slot in enumerate(idx_mapping.tolist()):
        computed, (start, end) = int(num_computed_tokens[slot]), query_start_loc[row : row + 2].tolist()
        seq_lens[row] = computed + end - start
        pos[start:end] = torch.arange(computed, computed + end - start)


def combine_sampled_and_draft_tokens(
    input_ids: Tensor,
    idx_mapping: Tensor,
    last_sampled_tokens: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    prefill_len: Tensor,
    *_: Any,
) -> Tensor:
    logits_indices = (query_start_loc[1 : len(idx_mapping) + 1] - 1).long()
    for row, slot in enumerate(idx_mapping.tolist()):
        if int(seq_lens[row]) > int(prefill_len[slot]):
            input_ids[logits_indices[row]] = last_sampled_tokens[slot, 0]
    return logits_indices


def get_num_sampled_and_rejected(
    num_sampled: Tensor, seq_lens: Tensor, cu_num_logits: Tensor, idx_mapping: Tensor, prefill_len: Tensor
) -> tuple[Tensor, Tensor]:
    counts = torch.where(seq_lens[: len(idx_mapping)] < prefill_len[idx_mapping], 0, num_sampled)
    return counts, torch.zeros_like(counts)


def post_update(
    idx_mapping: Tensor,
    num_computed_tokens: Tensor,
    last_sampled_tokens: Tensor,
    output_bin_counts: Tensor | None,
    sampled_tokens: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    query_start_loc: Tensor,
    all_token_ids: Tensor,
    total_len: Tensor,
) -> None:
    for row, slot in enumerate(idx_mapping.tolist()):
        if int(num_sampled[row]) > 0:
            last_sampled_tokens[slot] = sampled_tokens[row, 0]
            all_token_ids[slot, int(total_len[slot])] = sampled_tokens[row, 0]
            total_len[slot] += 1
        num_computed_tokens[slot] += query_start_loc[row + 1] - query_start_loc[row]


def compute_token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(1, token_ids.long())


def ranks(output: Tensor, logits: Tensor, stride: int, token_ids: Tensor, *_: Any, **__: Any) -> None:
    output.copy_((logits >= logits.gather(1, token_ids.long()[:, None])).sum(dim=-1))


def fill_logprob_token_ids(
    out: Tensor,
    out_stride: int,
    valid: Tensor,
    valid_stride: int,
    sampled: Tensor,
    top: Tensor,
    top_stride: int,
    expanded_idx_mapping: Tensor,
    num_named: Tensor,
    named: Tensor,
    named_stride: int,
    *,
    NUM_TOPK: int,  # noqa: N803 - the kernel's own name
    **_: Any,
) -> None:
    out[:, 0], valid[:, 0] = sampled, True
    for row, slot in enumerate(expanded_idx_mapping.tolist()):
        count = int(num_named[slot])
        source, count = (named[slot], count) if count else (top[row], NUM_TOPK)
        out[row, 1 : 1 + count], valid[row, 1 : 1 + count] = source[:count].long(), True


def sample_greedily(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of `gumbel_sample`: what it returns at temperature 0."""
    return logits.argmax(dim=-1)


def replace_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the V2 runner's host code run on CPU tensors."""
    monkeypatch.setattr(buffer_utils, "UvaBuffer", SharedBuffer)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: True)
    monkeypatch.setattr(buffer_utils, "_apply_write_kernel", Kernel(apply_write))
    for function in (
        prepare_prefill_inputs,
        prepare_pos_seq_lens,
        combine_sampled_and_draft_tokens,
        post_update,
    ):
        monkeypatch.setattr(model_runner, function.__name__, function)
    monkeypatch.setattr(sampler, "get_num_sampled_and_rejected", get_num_sampled_and_rejected)
    monkeypatch.setattr(sampler, "gumbel_sample", sample_greedily)
    monkeypatch.setattr(logprob, "compute_token_logprobs", compute_token_logprobs)
    monkeypatch.setattr(logprob, "_ranks_kernel", Kernel(ranks))
    monkeypatch.setattr(logprob, "_fill_logprob_token_ids_kernel", Kernel(fill_logprob_token_ids))
    monkeypatch.setattr(logprob, "triton", SimpleNamespace(next_power_of_2=lambda n: n))
