"""Real vLLM pooling servers with tiny random sequence classifiers."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from engine_process import free_port, running
from tiny_models import NUM_TOKENS, write_tokenizer

SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
ARGS = ("--served-model-name=judge", "--dtype=float32", "--enforce-eager", "--max-model-len=128", "--runner=pooling")
LABELS = ("unkind", "neutral", "kind")


def write_reward_model(directory: Path, *, num_labels: int, seed: int) -> Path:
    """A random Llama classifier whose logits spread over several units, so that an error in one does not hide."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=NUM_TOKENS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            num_labels=num_labels,
        )
        if num_labels == len(LABELS):
            config.id2label = dict(enumerate(LABELS))
            config.label2id = {name: index for index, name in enumerate(LABELS)}
        model = LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.08)
        model.score.weight.data.normal_(0, 0.5)
        model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@contextlib.contextmanager
def reward_server(model: Path, log: Path) -> Iterator[tuple[str, int]]:
    """A pooling server; yields its address and the id of its process group."""
    port = free_port()
    command = [*SERVER, f"--model={model}", "--host=127.0.0.1", f"--port={port}", *ARGS]
    with running(command, f"http://127.0.0.1:{port}/health", log) as process:
        yield f"http://127.0.0.1:{port}", process.pid
