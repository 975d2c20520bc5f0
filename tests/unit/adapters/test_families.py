"""Each family of models is either run exactly, compared with its own forward pass in transformers, or refused at load.

Rows are prefilled in chunks and decoded in batches that mix prefill and decoding, well beyond every sliding window and
beyond what the self-test at load looks at.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from steering_reference import load, params
from tiny_models import write_manifest, write_tokenizer
from trimtab_adapters.adapter_lm import load_adapter_lm
from trimtab_adapters.contract.errors import AdapterError
from trimtab_adapters.contract.manifest import read_vocabulary, vocabulary_fingerprint
from trimtab_adapters.residents import BaseModel, Residents
from trimtab_adapters.steering import SteeredRow, SteeringCore

CPU = torch.device("cpu")
NUM_TOKENS = 64
VOCAB_SIZE = 68
"""The base's logits are padded wider than the tokenizer."""
TOLERANCE = 1e-4
"""Float32 sums in another order differ by a few 1e-5 in two layers, a wrong mask or position by whole nats."""
COMMON = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TWO_KINDS = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
SCRIPTS = [random.Random(seed).choices(range(1, NUM_TOKENS), k=80) for seed in range(4)]
STARTS = [(0, 5), (0, 40), (2, 33), (5, 17)]
"""(step at which a row arrives, tokens of its prompt)"""
NUM_STEPS = 30

EXACT: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT),
    ("gpt2", GPT | {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", GPT | {"vocab_size": 72}),
    ("gpt_bigcode", GPT | {"multi_query": False}),
    ("gpt_bigcode", GPT),
    ("gpt_neox", {}),
    ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    ("biogpt", {}),
    ("persimmon", {}),
    ("phi", {}),
    ("llama", {}),
    ("llama", GROUPED | {"vocab_size": 80}),
    ("llama", GROUPED | {"tie_word_embeddings": True, "vocab_size": 66}),
    ("llama", GROUPED | {"attention_bias": True, "head_dim": 24}),
    ("llama", GROUPED | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    (
        "llama",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
            | {"original_max_position_embeddings": 32}
        },
    ),
    ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    ("qwen3", GROUPED | {"head_dim": 16}),
    ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 16}),
    ("mistral", GROUPED | {"sliding_window": None}),
    ("mistral", GROUPED | {"sliding_window": 8}),
    ("mistral", GROUPED | {"sliding_window": 40}),
    ("mixtral", GROUPED | EXPERTS | {"sliding_window": 40}),
    ("gemma", GROUPED | {"head_dim": 16}),
    ("gemma2", GROUPED | TWO_KINDS | {"head_dim": 16, "attn_logit_softcapping": None}),
    ("gemma3_text", GROUPED | TWO_KINDS | {"head_dim": 16}),
    ("phi3", GROUPED),
    ("phi3", GROUPED | {"sliding_window": 40}),
    ("olmo", GROUPED),
    ("olmo2", GROUPED),
    ("olmo3", GROUPED | TWO_KINDS),
    ("starcoder2", GROUPED | {"sliding_window": 40}),
    ("granite", GROUPED),
    ("cohere", GROUPED),
    ("cohere2", GROUPED | TWO_KINDS),
    ("glm4", GROUPED | {"head_dim": 16}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("exaone4", GROUPED | TWO_KINDS),
    ("seed_oss", GROUPED | {"head_dim": 16}),
]

NO_PAGING = "does not support an attention implementation through"
OTHER_LOGITS = r"gives other logits under paged attention than on its own \(largest difference .* nats\)"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", GROUPED | {"head_dim": 16}, "soft-capped attention and attention sinks are not supported"),
    ("vaultgemma", GROUPED | {"head_dim": 16}, "soft-capped attention and attention sinks are not supported"),
    ("gpt_oss", GROUPED | EXPERTS | {"head_dim": 16}, NO_PAGING),
    ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, NO_PAGING),
    ("gptj", GPT | {"rotary_dim": 8}, NO_PAGING),
    ("bloom", {"n_layer": 2, "n_head": 4}, NO_PAGING),
    ("mamba", {}, NO_PAGING),
    ("falcon", {"alibi": False}, OTHER_LOGITS),
    ("falcon", {"alibi": True}, OTHER_LOGITS),
    ("diffllama", GROUPED, OTHER_LOGITS),
    ("recurrent_gemma", {}, OTHER_LOGITS),
    ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, OTHER_LOGITS),
    ("stablelm", GROUPED, "paged attention was called without a batch"),
    ("nemotron", GROUPED, "paged attention was called without a batch"),
    (
        "deepseek_v3",
        GROUPED
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
        "Destination slice shape",
    ),
]

HARD_TO_SEE: list[tuple[str, dict[str, Any], str]] = [
    (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
        },
        "the rotation of keys depends on the longest position in the pass, not on their prefix alone",
    ),
    (
        "phimoe",
        GROUPED | {"num_local_experts": 4, "sliding_window": 40},
        "its sliding window is in the mask only, and longer than what the self-test looks at",
    ),
    (
        "llama4_text",
        GROUPED | {"head_dim": 16, "num_local_experts": 4, "attention_chunk_size": 40, "intermediate_size_mlp": 96},
        "its attention chunks are in the mask only, and longer than what the self-test looks at",
    ),
    (
        "lfm2",
        GROUPED | {"layer_types": ["full_attention", "conv"]},
        "its convolution reaches into the row packed before; the self-test decodes no single token, so sees nothing",
    ),
]


def write_family(directory: Path, family: str, options: dict[str, Any]) -> None:
    """A random model of two layers whose weights are large enough that every token in reach matters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(COMMON | options)))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
    model.save_pretrained(directory)
    write_tokenizer(directory, NUM_TOKENS)
    write_manifest(directory, "family")


def build_residents(directory: Path) -> Residents:
    vocabulary = read_vocabulary(directory)
    base = BaseModel(
        vocab_size=VOCAB_SIZE,
        num_tokens=NUM_TOKENS,
        vocabulary_sha256=vocabulary_fingerprint(vocabulary),
        max_model_len=100,
    )
    return Residents(base, CPU, kv_bytes=1 << 24, dtype=torch.float32)


class OwnForward:
    """The family's own forward pass with its own attention, no cache, over exactly the tokens of a row."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> Tensor:
        """`[V]` next-token log-probabilities; ids that the tokenizer does not have get the smallest one."""
        logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1, :NUM_TOKENS]
        known = torch.log_softmax(logits, dim=-1)
        return torch.cat((known, known.min().repeat(VOCAB_SIZE - NUM_TOKENS)))


def assert_exact(directory: Path) -> None:
    """Steer zero logits with alpha 1, so that the steered logits are the adapter's log-probabilities."""
    residents = build_residents(directory)
    version = load(residents, directory)
    own = OwnForward(directory)
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE, max_forward_tokens=16)
    rows: dict[int, SteeredRow] = {}
    for step in range(NUM_STEPS):
        for number, (start, num_prompt) in enumerate(STARTS):
            if start == step:
                rows[number] = core.open(params(f"row-{number}", (version, 1.0)), SCRIPTS[number][:num_prompt], [])
        logits = torch.zeros(len(STARTS), VOCAB_SIZE)
        core.step([(row, number) for number, row in rows.items()], logits)
        for number, row in rows.items():
            assert row.error is None
            if step < 8 or step == NUM_STEPS - 1:
                error = float((logits[number] - own.logprobs(row.tokens)).abs().max())
                assert error < TOLERANCE, (step, number, len(row.tokens))
            row.append([SCRIPTS[number][len(row.tokens)]])


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}={item}" for key, item in value.items())[:40]


@pytest.mark.parametrize(("family", "options"), EXACT, ids=name_of)
def test_a_family_that_is_accepted_is_exact(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    write_family(tmp_path, family, options)
    assert_exact(tmp_path)


@pytest.mark.parametrize(("family", "options", "reason"), REFUSED, ids=name_of)
def test_a_family_that_cannot_be_run_is_refused_with_the_reason(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_family(tmp_path, family, options)
    with pytest.raises(AdapterError, match=reason):
        load_adapter_lm(tmp_path, CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "options"),
    [pytest.param(family, options, id=f"{family}: {reason}") for family, options, reason in HARD_TO_SEE],
    ids=name_of,
)
def test_a_family_is_exact_or_refused(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Each differs from its own forward pass where a short comparison of whole prompts does not look."""
    write_family(tmp_path, family, options)
    try:
        load_adapter_lm(tmp_path, CPU, dtype=torch.float32)
    except AdapterError:
        return
    assert_exact(tmp_path)


def test_a_configuration_that_cannot_be_read_is_refused_as_an_adapter_error(tmp_path: Path) -> None:
    """Gemma 4 has heads of two sizes; its configuration refuses to name one."""
    write_family(tmp_path, "gemma4_text", GROUPED | {"vocab_size_per_layer_input": NUM_TOKENS})
    with pytest.raises(AdapterError, match="head_dim"):
        load_adapter_lm(tmp_path, CPU, dtype=torch.float32)
