"""Random Llama models of a given size, kept outside the repository. Speed does not depend on what the weights say."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.store import VersionStore


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a random Llama; embeddings are tied."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int = 32_768
    max_length: int = 4096
    dtype: str = "bfloat16"

    @property
    def num_parameters(self) -> int:
        """Weights, norms left out."""
        per_layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * per_layer + self.vocab_size * self.hidden_size


BASE = LlamaShape(num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=2816)
ADAPTER = LlamaShape(num_layers=8, hidden_size=512, num_heads=8, intermediate_size=1408)


def parse_shape(text: str, default: LlamaShape) -> LlamaShape:
    """`layers x hidden`, for example `24x1024`, with heads of 64 and an MLP 2.75 times as wide."""
    if not text:
        return default
    layers, hidden = (int(part) for part in text.lower().split("x"))
    return LlamaShape(layers, hidden, hidden // 64, hidden * 11 // 4)


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/trimtab/bench` or `~/.cache/trimtab/bench`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "bench"


def llama(shape: LlamaShape, *, seed: int) -> Path:
    """A directory with a random Llama and a word-level tokenizer; made once."""
    key = hashlib.sha256(json.dumps([asdict(shape), seed]).encode()).hexdigest()[:12]
    directory = cache_dir() / f"llama-{key}"
    if (directory / "tokenizer_config.json").exists():
        return directory
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).save_pretrained(directory)
    vocabulary = {"<eos>": 0} | {f"t{index}": index for index in range(1, shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(directory)
    return directory


def version(directory: Path, name: str) -> tuple[Manifest, Path]:
    """The directory as an adapter version."""
    return VersionStore(cache_dir() / "store").add(directory, name=name)
