"""The small language models of the tasks, each made once and kept outside the repository under a hash of its recipe."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from harness.models import cache_dir
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_training.models import Vocabulary, end_token_ids, load_causal_lm, save_causal_lm

_DONE = "recipe.json"


@dataclass(frozen=True, slots=True)
class ExpertRecipe:
    """How an expert is fine-tuned."""

    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 5e-4
    max_length: int = 160
    most_texts: int = 2000
    seed: int = 0


def cached(kind: str, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The directory that `make` fills, made when it is not in the cache; `recipe` is JSON-able and says all of it."""
    text = json.dumps(recipe, sort_keys=True)
    directory = cache_dir() / "tasks" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if (directory / _DONE).exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=directory.parent))
    try:
        make(temporary)
        (temporary / _DONE).write_text(text + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def fingerprint(directory: Path) -> str:
    """Hash of a model's weights and tokenizer."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        digest.update(hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


def expert(start: Path, items: Sequence[RewardInput], vocabulary: Vocabulary, recipe: ExpertRecipe) -> Path:
    """Directory of a language model fine-tuned on some outputs after their prompts.

    Args:
        start: The model that it starts from.
        items: What it is to imitate.
        vocabulary: Of the model.
        recipe: How.
    """
    chosen = list(items)
    random.Random(recipe.seed).shuffle(chosen)
    chosen = chosen[: recipe.most_texts]
    texts = hashlib.sha256(json.dumps([[item.prompt, item.output] for item in chosen]).encode()).hexdigest()
    key = {"start": fingerprint(start), "texts": texts, **asdict(recipe)}
    return cached("expert", key, lambda directory: _fine_tune(start, chosen, vocabulary, recipe, directory))


def _fine_tune(
    start: Path, items: Sequence[RewardInput], vocabulary: Vocabulary, recipe: ExpertRecipe, directory: Path
) -> None:
    model = load_causal_lm(start, dtype=torch.float32, device="cpu").train()
    end = sorted(end_token_ids(model))[:1]
    rows: list[tuple[list[int], int]] = []
    for item in items:
        prompt = vocabulary.encode(item.prompt)
        ids = [*prompt, *vocabulary.encode(item.output), *end][: recipe.max_length]
        if 0 < len(prompt) < len(ids):
            rows.append((ids, len(prompt)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
    generator = random.Random(recipe.seed)
    batches = [batch for _ in range(recipe.epochs) for batch in _epoch(rows, recipe.batch_size, generator)]
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 20) * (1 - step / len(batches))
        optimiser.zero_grad()
        _output_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    save_causal_lm(model.eval(), directory, vocabulary.path)


def _epoch(
    rows: Sequence[tuple[list[int], int]], batch_size: int, generator: random.Random
) -> list[list[tuple[list[int], int]]]:
    """Batches of rows of like length, in random order."""
    ordered = sorted(rows, key=lambda row: (len(row[0]), generator.random()))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    generator.shuffle(batches)
    return batches


def _output_loss(model: Any, batch: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Mean negative log-likelihood of the output tokens; padding stands behind, where causal attention ignores it."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in batch])
    targets = torch.full_like(ids, -100)
    for index, (row, num_prompt) in enumerate(batch):
        targets[index, num_prompt : len(row)] = ids[index, num_prompt : len(row)]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
