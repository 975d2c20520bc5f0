"""Make a small real language model for the tasks, or say where it is: a better base, a smaller or a larger sibling.

    python bench/tasks/train_lm.py --size base --minutes 60

It learns from the same kinds of text as the models beside the data, in the forms in which the tasks ask, but never
from a held-out prompt of a task. Name the directory that is printed to `run.py` as `--base` or `--start`. With
`--init` it goes on from a model that is there.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of `harness` and `tasks`

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.language_models import cached, fingerprint
from tasks.open_ended import opening
from tasks.rows import part_of, read_rows
from trimtab_training.models import Vocabulary, load_causal_lm, load_vocabulary

_CONTEXT = 256
_VALIDATION_ROWS = 64


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a Llama with heads of 64 and tied embeddings."""

    layers: int
    width: int


SIZES: Final = {"tiny": Size(2, 64), "small": Size(4, 128), "base": Size(6, 320), "large": Size(8, 512)}


def documents(data: Path) -> Iterator[str]:
    """Texts to learn from, held-out prompts of the tasks left out."""
    for row in read_rows(data, "tinystories/stories"):
        if part_of(opening(row["text"])) != "held_out":
            yield row["text"]
    for name in ("storybooks/stories", "pd_children_books/chapters"):
        yield from (row["text"] for row in read_rows(data, name))
    for row in read_rows(data, "commongen/concept_sets"):
        if part_of(", ".join(sorted(row["concepts"]))) != "held_out":
            yield from (f"Keywords: {', '.join(row['concepts'])}\nSentence: {text}" for text in row["references"])
    for row in read_rows(data, "schema_dialogues/dialogues"):
        names = {"user": "User", "system": "Assistant"}
        yield "\n".join(f"{names[turn['speaker']]}: {turn['text']}" for turn in row["turns"])
    for row in read_rows(data, "topical_chat/dialogues"):
        yield "\n".join(f"{'A' if turn['speaker'] == 1 else 'B'}: {turn['text']}" for turn in row["turns"])
    for row in read_rows(data, "diasafety/pairs"):
        if part_of(row["context"]) != "held_out":
            yield f"A: {row['context']}\nB: {row['response']}"
    for row in read_rows(data, "begin_wow/responses"):
        if part_of(row["knowledge"]) != "held_out":
            yield f"{row['knowledge']}\nA: {row['message']}\nB: {row['response']}"
    for row in read_rows(data, "real_toxicity_prompts/prompts"):
        if part_of(row["prompt"]) != "held_out":
            yield row["prompt"] + row["continuation"]
    yield from (row["text"] for row in read_rows(data, "goemotions/comments"))


def language_model(data: Path, tokenizer: Path, size: Size, settings: dict[str, Any]) -> Path:
    """Directory of the model; trained when it is not in the cache."""
    init = settings.get("init")
    recipe = settings | {"size": asdict(size), "tokenizer": fingerprint(tokenizer)}
    recipe |= {"init": fingerprint(Path(init))} if init else {}
    return cached("lm", recipe, lambda directory: _train(data, tokenizer, size, settings, directory))


def _train(data: Path, tokenizer: Path, size: Size, settings: dict[str, Any], directory: Path) -> None:
    torch.manual_seed(settings["seed"])
    rng = np.random.default_rng(settings["seed"])
    vocabulary = load_vocabulary(tokenizer)
    ids = _token_ids(list(documents(data)), vocabulary, rng)
    validation = ids[: _VALIDATION_ROWS * (_CONTEXT + 1)].reshape(_VALIDATION_ROWS, -1)
    train = ids[validation.size :]
    model = _model(size, vocabulary, settings.get("init"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    began, step = time.monotonic(), 0
    while (share := (time.monotonic() - began) / (60 * settings["minutes"])) < 1:
        for group in optimiser.param_groups:
            cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2
            group["lr"] = settings["lr"] * min(1.0, (step + 1) / 200) * cosine
        starts = rng.integers(0, len(train) - _CONTEXT - 1, settings["batch_size"])
        loss = _loss(model, np.stack([train[start : start + _CONTEXT + 1] for start in starts]))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {share:.0%} of the time", file=sys.stderr, flush=True)
    model.eval()
    with torch.no_grad():
        found = [_loss(model, part).item() for part in np.array_split(validation, 8)]
    model.to(torch.bfloat16).save_pretrained(directory)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copyfile(path, directory / path.name)
    report = {
        "validation_nats_per_token": float(np.mean(found)),
        "steps": step,
        "tokens_seen": step * settings["batch_size"] * _CONTEXT,
        "tokens_of_text": len(train),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    (directory / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def _model(size: Size, vocabulary: Vocabulary, init: str | None) -> Any:
    if init is not None:
        return load_causal_lm(Path(init), dtype=torch.float32, device="cpu")
    heads = size.width // 64
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary.num_tokens,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3 // 32 * 32,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def _token_ids(texts: list[str], vocabulary: Vocabulary, rng: np.random.Generator) -> NDArray[np.int64]:
    """All texts in random order behind each other, each ended by token 0."""
    rng.shuffle(texts)
    encoded = vocabulary.tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*row.ids, 0], dtype=np.int64) for row in encoded])


def _loss(model: Any, rows: NDArray[np.int64]) -> torch.Tensor:
    ids = torch.from_numpy(rows)
    # On a processor without instructions for it bfloat16 takes several times as long as float32.
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/models/base7m"), help="that of this model")
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--init", type=Path, help="go on from this model, whose size counts")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    settings = {"minutes": options.minutes, "lr": options.lr, "batch_size": options.batch_size, "seed": options.seed}
    settings |= {"init": str(options.init)} if options.init else {}
    directory = language_model(options.data, options.tokenizer, SIZES[options.size], settings)
    report = json.loads((directory / "training.json").read_text())
    print(f"{directory}: {report['parameters'] / 1e6:.1f} M parameters, ", end="")
    print(f"{report['tokens_seen'] / 1e6:.1f} M tokens, {report['validation_nats_per_token']:.3f} nats per token")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
