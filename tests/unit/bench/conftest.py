"""A world in which a task of `bench/tasks` runs within seconds."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["kind", "cruel", *(f"w{i}" for i in range(60))]


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`models` and `data` with made-up continuations that are toxic when they say `cruel`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, seed in (("base", 1), ("start", 2)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS) + 1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer = Tokenizer(models.WordLevel({"<eos>": 0} | {w: i + 1 for i, w in enumerate(WORDS)}, "<eos>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    rng = random.Random(0)
    for name, rows in (
        ("real_toxicity_prompts/prompts", [_prompt_row(rng) for _ in range(200)]),
        ("surge_toxicity/comments", [{"text": f"{rng.choice(WORDS)} w1", "label": "toxic"}]),
    ):
        path = tmp_path / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


def _prompt_row(rng: random.Random) -> dict[str, Any]:
    is_toxic = rng.random() < 0.5
    text = [*rng.choices(WORDS[2:], k=6), "cruel" if is_toxic else "kind"]
    scores = {"toxicity": 0.9 if is_toxic else 0.05}
    prompt = " ".join(rng.choices(WORDS[2:], k=3))
    return {"prompt": prompt, "continuation": " ".join(text), "prompt_scores": None, "continuation_scores": scores}
