"""Tiny random models and version directories, made in a second."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from trimtab_adapters.contract.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    read_vocabulary,
    vocabulary_fingerprint,
)

NUM_TOKENS = 128


@dataclass(frozen=True)
class TinyModels:
    """Directories of tiny random Llama models over one word-level vocabulary of 128 tokens `t1` ... and `<eos>` = 0.

    `adapter` and `other` are version directories; `other` has a prefix of one control token beyond the vocabulary.
    `classifier` is a random sequence classifier with two labels.
    """

    base: Path
    adapter: Path
    other: Path
    classifier: Path

    def manifest(self, name: str) -> Manifest:
        return Manifest.model_validate_json((getattr(self, name) / MANIFEST_FILE).read_bytes())


def write_manifest(directory: Path, name: str, *, prefix: list[int] | None = None) -> Manifest:
    """Make a directory with a model and a tokenizer a version directory."""
    vocabulary = read_vocabulary(directory)
    files = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size)
        for path in directory.iterdir()
        if path.name != MANIFEST_FILE
    }
    manifest = Manifest(
        name=name,
        vocabulary_sha256=vocabulary_fingerprint(vocabulary),
        vocab_size=len(vocabulary),
        prefix_token_ids=prefix or [],
        files=files,
    )
    (directory / MANIFEST_FILE).write_bytes(manifest.canonical_json())
    return manifest


def write_tokenizer(directory: Path, num_tokens: int = NUM_TOKENS) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0} | {f"t{index}": index for index in range(1, num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>"
    ).save_pretrained(directory)


def write_llama(
    directory: Path, *, seed: int, num_layers: int, width: int, vocab_size: int = NUM_TOKENS, max_length: int = 512
) -> None:
    """A random Llama with peaked next-token distributions, so that greedy decoding has no near ties."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.08)
        model.lm_head.weight.data.normal_(0, 0.5)
        model.save_pretrained(directory)


def write_classifier(directory: Path, *, seed: int) -> None:
    """A random Llama sequence classifier."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=NUM_TOKENS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            num_labels=2,
        )
        LlamaForSequenceClassification(config).save_pretrained(directory)


def make_tiny_models(root: Path) -> TinyModels:
    """Write a base and two adapter versions."""
    models = TinyModels(
        base=root / "base", adapter=root / "adapter", other=root / "other", classifier=root / "classifier"
    )
    write_llama(models.base, seed=1, num_layers=4, width=128)
    write_llama(models.adapter, seed=2, num_layers=2, width=64, max_length=1024)
    write_llama(models.other, seed=3, num_layers=2, width=64, vocab_size=NUM_TOKENS + 8, max_length=1024)
    write_classifier(models.classifier, seed=4)
    for directory in (models.base, models.adapter, models.other, models.classifier):
        write_tokenizer(directory)
    write_manifest(models.adapter, "adapter")
    write_manifest(models.other, "other", prefix=[NUM_TOKENS + 2])
    return models
