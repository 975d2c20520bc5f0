"""Tiny random adapter LMs with the answers to everything that a schedule can ask of them.

Whatever is scheduled, a request's tokens are the beginning of one of a few scripts, its "sampled" tokens included. So
the reference, an HF forward pass with the model's own attention and no cache, is evaluated once over every script, and
a schedule of thousands of steps only looks it up.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tiny_models import write_manifest, write_tokenizer
from trimtab_adapters.adapter_lm import AdapterLM, load_adapter_lm
from trimtab_adapters.contract.manifest import read_vocabulary, vocabulary_fingerprint
from trimtab_adapters.residents import BaseModel, Residents

CPU = torch.device("cpu")
NUM_TOKENS = 44
"""Tokens of the tokenizer."""
VOCAB_SIZE = 48
"""Width of the base's logits: padded, so that the floor for unknown ids is at work."""
SCRIPT_LENGTH = 72
"""Tokens of a script: four and a half blocks."""


@dataclass(frozen=True)
class Expert:
    """A version directory and its log-probabilities along every script.

    Attributes:
        table: `[scripts, SCRIPT_LENGTH, V]`; entry n - 1 is the next-token distribution after n tokens of the script.
    """

    name: str
    directory: Path
    version: str
    num_prefix: int
    table: Tensor

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of 16 that prefix and tokens take when nothing is shared."""
        return -(-(self.num_prefix + num_tokens) // 16)


@dataclass(frozen=True)
class Checked:
    """An adapter LM that needs no check any more."""

    adapter: AdapterLM

    def check(self) -> Iterator[None]:
        return iter(())


@dataclass(frozen=True)
class World:
    """What a schedule is made of. `base_logits` are `[rows, V]`, some with ids forbidden as by a grammar."""

    scripts: list[list[int]]
    experts: list[Expert]
    base: BaseModel
    base_logits: Tensor
    loaded: dict[Path, AdapterLM] = field(default_factory=dict)

    def build_residents(self, kv_bytes: int) -> Residents:
        return Residents(self.base, CPU, kv_bytes=kv_bytes, dtype=torch.float32)

    def read_adapter_lm(self, directory: Path, *args: Any, **options: Any) -> "Checked":
        """Stands in for the loader of the same name: reads and checks a directory once and hands out copies."""
        if directory not in self.loaded:
            self.loaded[directory] = load_adapter_lm(directory, *args, **options)
        return Checked(copy.deepcopy(self.loaded[directory]))


def make_scripts(num_families: int = 6, num_tails: int = 4) -> list[list[int]]:
    """Scripts that share beginnings of every length around whole blocks: within a family long, between them short."""
    rng = random.Random(20)
    common = [5, 15, 16, 17, 33, 48]
    scripts: list[list[int]] = []
    for family in range(num_families):
        parent = scripts[-1][: 16 * (family % 3)] if scripts else []
        start = [*parent, *(rng.randrange(1, NUM_TOKENS) for _ in range(SCRIPT_LENGTH))][: common[family]]
        for _ in range(num_tails):
            tail = [rng.randrange(1, NUM_TOKENS) for _ in range(SCRIPT_LENGTH - len(start))]
            scripts.append(start + tail)
    scripts.append([3] * SCRIPT_LENGTH)  # every block holds the same tokens: only its parent tells it apart
    return scripts


def _llama(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=NUM_TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def _write(model: Any, directory: Path) -> None:
    """Save a model whose weights are large enough that every token in reach matters."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(directory)
    write_tokenizer(directory, NUM_TOKENS)


@torch.inference_mode()
def _table(directory: Path, prefix: list[int], scripts: list[list[int]]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits = model(torch.tensor([prefix + script for script in scripts])).logits
    known = torch.log_softmax(logits[:, len(prefix) :, :NUM_TOKENS], dim=-1)
    floor = known.min(dim=-1, keepdim=True).values
    return torch.cat((known, floor.repeat(1, 1, VOCAB_SIZE - NUM_TOKENS)), dim=-1).clone()


def _expert(root: Path, name: str, model: Any, prefix: list[int], scripts: list[list[int]]) -> Expert:
    directory = root / name
    _write(model, directory)
    version = write_manifest(directory, name, prefix=prefix).version_id
    return Expert(name, directory, version, len(prefix), _table(directory, prefix, scripts))


def make_world(root: Path) -> World:
    """Five experts: four of one geometry, so of one pool, with two prefixes, one of them longer than a block."""
    scripts = make_scripts()
    long_prefix = [1 + index % 7 for index in range(18)]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        models: Mapping[str, tuple[Any, list[int]]] = {
            "plain": (_llama(NUM_TOKENS), []),
            "twin": (_llama(NUM_TOKENS), []),
            "control": (_llama(VOCAB_SIZE + 4), [NUM_TOKENS + 1, NUM_TOKENS + 5, 7]),
            "persona": (_llama(VOCAB_SIZE), long_prefix),
            "gpt2": (_gpt2(), []),
        }
        experts = [_expert(root, name, model, prefix, scripts) for name, (model, prefix) in models.items()]
        base_logits = torch.randn(512, VOCAB_SIZE) * 3
    base_logits[::3, NUM_TOKENS:] = -torch.inf
    vocabulary = read_vocabulary(experts[0].directory)
    base = BaseModel(
        vocab_size=VOCAB_SIZE,
        num_tokens=len(vocabulary),
        vocabulary_sha256=vocabulary_fingerprint(vocabulary),
        max_model_len=SCRIPT_LENGTH,
    )
    return World(scripts=scripts, experts=experts, base=base, base_logits=base_logits)
