"""The plain loop that steering is compared with, and short ways to set a core up."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab_adapters.contract.engine_api import LoadedVersion
from trimtab_adapters.contract.manifest import read_manifest, read_vocabulary, vocabulary_fingerprint
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.residents import BaseModel, Residents

VOCAB_SIZE = 128


@dataclass
class Reference:
    """The plain loop that steering must equal: one HF forward pass over everything, no cache, float32."""

    models: dict[str, Any] = field(default_factory=dict)
    prefixes: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, directory: Path) -> None:
        self.models[name] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.prefixes[name] = read_manifest(directory).prefix_token_ids

    @torch.inference_mode()
    def logprobs(self, name: str, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*self.prefixes[name], *tokens]])
        logits: Tensor = self.models[name](ids).logits[0, -1, :VOCAB_SIZE]
        return torch.log_softmax(logits, dim=-1)


def load(residents: Residents, directory: Path) -> str:
    """Prepare, wait and commit; returns the version id."""
    version = read_manifest(directory).version_id
    residents.prepare(version, str(directory))
    wait(residents, version)
    residents.commit(version)
    return version


def wait(residents: Residents, version: str) -> LoadedVersion:
    """Until a version is no longer loading; returns its state."""
    while (status := residents.poll(version)).state == "loading":
        time.sleep(0.002)  # a loop without it starves the loading thread of the interpreter
    return status


def live_bytes() -> int:
    """Memory of all tensors that anybody holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def base_description(directory: Path, max_model_len: int = 256) -> BaseModel:
    vocabulary = read_vocabulary(directory)
    return BaseModel(
        vocab_size=VOCAB_SIZE,
        num_tokens=len(vocabulary),
        vocabulary_sha256=vocabulary_fingerprint(vocabulary),
        max_model_len=max_model_len,
    )


def params(uid: str, *terms: tuple[str, float], record: bool = True) -> SteeringParams:
    return SteeringParams(
        uid=uid, adapters=[AdapterWeight(name="a", version=v, alpha=alpha) for v, alpha in terms], record=record
    )
