"""A real reward for benches: a small classifier of sentiment, trained once from labelled sentences.

It starts from a small language model with the base's tokenizer and learns to tell positive from negative texts: film
reviews and comments, alone and up to four in a row. The target of several is the share of positive ones among them, so
that a passage is judged by all of it and not by its end. Its one logit is the log-odds of `positive`; as a reward it
has hardly any ties. A fifth of the texts is held out, chosen by their hash.
"""

import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from harness.models import cache_dir

_FILES = ("sentence_polarity/sentences.jsonl.gz", "goemotions/comments.jsonl.gz")
_REPORT = "training.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the classifier is trained; two equal recipes share one classifier."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    smoothing: float = 0.05
    max_length: int = 160
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """One labelled text.

    Attributes:
        source: Which set it comes from.
        ids: Its tokens.
        is_positive: Its label.
        is_held_out: Whether it is kept for measuring.
    """

    source: str
    ids: tuple[int, ...]
    is_positive: bool
    is_held_out: bool


def classifier(data: Path, start: Path, recipe: Recipe | None = None) -> Path:
    """Directory of the classifier; trained (some minutes on one core) when it is not in the cache.

    Args:
        data: Directory of the text data.
        start: Directory of the language model that it starts from; its tokenizer is kept.
        recipe: How it is trained.
    """
    recipe = recipe or Recipe()
    digest = hashlib.sha256(json.dumps(asdict(recipe)).encode())
    for path in (*(data / name for name in _FILES), start / "model.safetensors", start / "tokenizer.json"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    directory = cache_dir() / f"classifier-{digest.hexdigest()[:12]}"
    if not (directory / _REPORT).exists():
        _train(data, start, recipe, directory)
    return directory


def training_report(directory: Path) -> dict[str, Any]:
    """Accuracy on the held-out texts by source, and numbers of texts and parameters."""
    report: dict[str, Any] = json.loads((directory / _REPORT).read_text())
    return report


def _train(data: Path, start: Path, recipe: Recipe, directory: Path) -> None:
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)  # the same weights whatever the machine, and no threads that wait for each other
    tokenizer = AutoTokenizer.from_pretrained(start)
    texts = list(_texts(data, tokenizer))
    model = LlamaForSequenceClassification.from_pretrained(
        start, dtype=torch.float32, num_labels=1, id2label={0: "positive"}, label2id={"positive": 0}
    )
    trained_on = [text for text in texts if not text.is_held_out]
    _fit(model, trained_on, recipe)
    held_out = [text for text in texts if text.is_held_out]
    report = {
        "accuracy": _accuracy(model, held_out),
        "trained_on": len(trained_on),
        "held_out": len(held_out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": asdict(recipe),
    }
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / _REPORT).write_text(json.dumps(report, indent=1) + "\n")  # last: it marks the rest as complete


def _texts(data: Path, tokenizer: Any) -> Iterator[Text]:
    for name in _FILES:
        source = name.split("/")[0]
        with gzip.open(data / name, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                label = row.get("label") or row.get("sentiment")
                if label in ("positive", "negative"):
                    is_held_out = int(hashlib.sha256(row["text"].encode()).hexdigest(), 16) % 5 == 0
                    yield Text(source, tuple(tokenizer(row["text"])["input_ids"]), label == "positive", is_held_out)


def _fit(model: Any, texts: list[Text], recipe: Recipe) -> None:
    generator = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    epochs = [_batches(texts, recipe, generator) for _ in range(recipe.epochs)]
    num_steps = sum(len(batches) for batches in epochs)
    step = 0
    model.train()
    for batches in epochs:
        for batch in batches:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1.0, step / 100) * max(0.02, 1 - step / num_steps)
            targets = torch.tensor([share for _, share in batch])
            targets = targets * (1 - recipe.smoothing) + recipe.smoothing / 2
            loss = binary_cross_entropy_with_logits(_logits(model, [ids for ids, _ in batch]), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 100 == 0:
                print(f"step {step} of {num_steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def _batches(texts: list[Text], recipe: Recipe, generator: random.Random) -> list[list[tuple[tuple[int, ...], float]]]:
    """One epoch: passages and their shares of positive texts, in batches of similar length and random order."""
    passages: list[tuple[tuple[int, ...], float]] = []
    left = list(texts)
    generator.shuffle(left)
    while left:
        parts = left[-generator.choice((1, 1, 2, 3, 4)) :]
        del left[-len(parts) :]
        ids = tuple(token for part in parts for token in part.ids)
        if len(ids) <= recipe.max_length:
            passages.append((ids, sum(part.is_positive for part in parts) / len(parts)))
    generator.shuffle(passages)
    size, batches = recipe.batch_size, []
    for begin in range(0, len(passages), size * 20):
        near = sorted(passages[begin : begin + size * 20], key=lambda passage: len(passage[0]))
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    generator.shuffle(batches)
    return batches


def _logits(model: Any, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """One number per row; the padding on the right is the model's own."""
    width = max(len(ids) for ids in rows)
    padding: int = model.config.pad_token_id
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return logits


@torch.inference_mode()
def _accuracy(model: Any, texts: list[Text]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    ordered = sorted(texts, key=lambda text: len(text.ids))
    for begin in range(0, len(ordered), 128):
        batch = ordered[begin : begin + 128]
        for text, logit in zip(batch, _logits(model, [text.ids for text in batch]).tolist(), strict=True):
            right.setdefault(text.source, []).append((logit > 0) is text.is_positive)
    return {source: sum(values) / len(values) for source, values in sorted(right.items())}
