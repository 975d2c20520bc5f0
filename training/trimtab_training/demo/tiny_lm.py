"""Tiny language models of the demonstration's world, made from nothing in about two minutes on two cores.

`build` trains a base LM and an adapter LM on the world's corpus and keeps them in a cache outside the repository;
`build_random` writes untrained ones for tests. All are ordinary Hugging Face directories: a byte-level BPE tokenizer
whose id 0 is `<|endoftext|>`, `config.json` and safetensors. Head sizes are 32 or 64, which vLLM's CPU attention takes.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trimtab_training.demo import phrases, world

END_OF_TEXT: Final = "<|endoftext|>"
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{{ 'assistant:' }}"
)

Report = Callable[[str], None]
Dtype = Literal["float32", "bfloat16"]
Arch = Literal["llama", "gpt2"]


@dataclass(frozen=True, slots=True)
class LmSettings:
    """Shape and training of one LM. `num_tokens` is how many corpus tokens it is trained on."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_tokens: int
    learning_rate: float = 8e-3
    matrix_learning_rate: float = 0.02
    batch_size: int = 8


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Everything that decides what `build` makes. The defaults are the demonstration's."""

    seed: int = 0
    vocab_size: int = 1400
    context: int = 256
    train_length: int = 128
    num_documents: int = 20_000
    base: LmSettings = field(default_factory=lambda: LmSettings(192, 3, 6, 512, 500_000))
    adapter: LmSettings = field(default_factory=lambda: LmSettings(128, 3, 4, 384, 320_000))
    dtype: Dtype = "float32"


@dataclass(frozen=True, slots=True)
class DemoModels:
    """Where the two LMs are, and their validation losses in nats per token."""

    base: Path
    adapter: Path
    base_loss: float
    adapter_loss: float


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/trimtab` or `~/.cache/trimtab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def cache_key(settings: DemoSettings) -> str:
    """A hash of the settings and of the sources that decide the result."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for source in (phrases.__file__, world.__file__, __file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:12]


def build(
    settings: DemoSettings | None = None, *, cache_dir: Path | None = None, report: Report = lambda _line: None
) -> DemoModels:
    """Make the base LM and the adapter LM, or find them in the cache.

    Args:
        settings: What to make; None for the demonstration's.
        cache_dir: Parent of the cached directory; None for `default_cache_dir()`.
        report: Called with a line of progress now and then.
    """
    settings = settings or DemoSettings()
    target = (cache_dir or default_cache_dir()) / f"demo-{cache_key(settings)}"
    if not (target / "losses.json").exists():
        _make_cached(settings, target, report)
    losses = json.loads((target / "losses.json").read_text())
    return DemoModels(target / "base", target / "adapter", losses["base"], losses["adapter"])


def _make_cached(settings: DemoSettings, target: Path, report: Report) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _make(settings, work, report)
        try:
            work.rename(target)
        except OSError:
            # Somebody else finished the same directory meanwhile; theirs is as good as ours.
            if not (target / "losses.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make(settings: DemoSettings, directory: Path, report: Report) -> None:
    corpus = world.documents(settings.seed, settings.num_documents)
    tokenizer = train_tokenizer(corpus, settings.vocab_size)
    tokens = _pack(tokenizer, corpus, settings.train_length)
    held_out = _pack(tokenizer, world.documents(settings.seed + 1, 400), settings.train_length)
    directory.chmod(0o755)  # a temporary directory is private; other users may read a finished model
    report(f"corpus: {len(corpus)} scenes, {tokens.numel()} tokens, vocabulary {tokenizer.get_vocab_size()}")
    losses = {}
    for name, lm in (("base", settings.base), ("adapter", settings.adapter)):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(_llama_config(lm, tokenizer.get_vocab_size(), settings.context))
        started = time.monotonic()
        with _few_threads():
            for line in _train(model, tokens, lm, settings.seed):
                report(f"{name} LM: {line}")
        losses[name] = _loss(model, held_out)
        report(
            f"{name} LM: {model.num_parameters():,} parameters, validation loss {losses[name]:.3f} nats per token, "
            f"{time.monotonic() - started:.0f} s"
        )
        save_model(directory / name, model, tokenizer, settings.context, dtype=settings.dtype)
    (directory / "losses.json").write_text(json.dumps(losses))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer that can encode any text; the same texts always give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pack(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """Documents end to end, each followed by `<|endoftext|>`, cut into rows: [rows, length]."""
    ids = [token for encoding in tokenizer.encode_batch(list(texts)) for token in (*encoding.ids, 0)]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _llama_config(lm: LmSettings, vocab_size: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=lm.hidden_size,
        num_hidden_layers=lm.num_layers,
        num_attention_heads=lm.num_heads,
        num_key_value_heads=lm.num_heads,
        intermediate_size=lm.intermediate_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **_special_ids(),
    )


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@contextmanager
def _few_threads(most: int = 4) -> Iterator[None]:
    """Models this small get slower with every core beyond a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(model: Any, tokens: torch.Tensor, lm: LmSettings, seed: int) -> Iterator[str]:
    """Warm-up and cosine decay over rows drawn without replacement, epoch by epoch; yields its progress.

    Muon for the weight matrices and AdamW for the rest: at this size it needs half the tokens of AdamW alone until the
    model copies names and things from the prompt.
    """
    num_steps = max(1, lm.num_tokens // (lm.batch_size * tokens.shape[1]))
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    optimizers = [
        torch.optim.Muon(matrices, lr=lm.matrix_learning_rate, weight_decay=0.1),
        torch.optim.AdamW(others, lr=lm.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    warm_up = max(1, num_steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1.0 + math.cos(math.pi * step / num_steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(num_steps):
        while len(order) < lm.batch_size:
            order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
        batch, order = tokens[order[: lm.batch_size]], order[lm.batch_size :]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        if (step + 1) % max(1, num_steps // 10) == 0:
            yield f"step {step + 1}/{num_steps}, loss {loss.item():.3f}"
    model.eval()


@torch.no_grad()
def _loss(model: Any, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per token."""
    losses = [float(model(input_ids=rows, labels=rows, use_cache=False).loss) for rows in torch.split(tokens, 16)]
    return sum(losses) / len(losses)


def save_model(
    directory: Path,
    model: Any,
    tokenizer: Tokenizer,
    context: int,
    *,
    dtype: Dtype = "float32",
    chat_template: str | None = CHAT_TEMPLATE,
) -> None:
    """Write a model and its tokenizer as a Hugging Face directory, safetensors only."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build_random(
    directory: Path,
    *,
    arch: Arch = "llama",
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    vocab_size: int = 512,
    context: int = 256,
    std: float = 0.2,
    dtype: Dtype = "float32",
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write an untrained tiny LM to `directory` in well under a second, for tests.

    All models of one `vocab_size` have the same tokenizer, so any of them can steer any other. `std` is the standard
    deviation of the weights: the default makes next-token distributions clearly uneven and different between seeds.

    Returns:
        `directory`.
    """
    tokenizer = train_tokenizer(world.documents(0, 400), vocab_size)
    torch.manual_seed(seed)
    num_tokens = tokenizer.get_vocab_size()
    model: Any
    if arch == "llama":
        lm = LmSettings(hidden_size, num_layers, num_heads, 2 * hidden_size, 0)
        config = _llama_config(lm, num_tokens, context)
        config.initializer_range = std
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=num_tokens,
                n_embd=hidden_size,
                n_layer=num_layers,
                n_head=num_heads,
                n_positions=context,
                initializer_range=std,
                **_special_ids(),
            )
        )
    save_model(directory, model.eval(), tokenizer, context, dtype=dtype, chat_template=chat_template)
    return directory
