"""A LoRA on the adapter LM, through PEFT: only its matrices are trained, and only they are saved."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from trimtab_adapters.contract.errors import AdapterError
from trimtab_training.models_config import LoraConfig


def with_lora(trunk: Any, config: LoraConfig, *, seed: int) -> Any:
    """A model that computes what `trunk` computes until it is trained; the trunk's own weights are frozen.

    Raises:
        AdapterError: The trunk has none of the layers that the update is for.
    """
    targets = config.target_modules
    settings = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(trunk, settings)
        except ValueError as exc:
            raise AdapterError(f"models.lora does not fit the adapter LM: {exc}") from exc


def load_lora(trunk: Any, directory: Path) -> Any:
    """Put a LoRA that `save_lora` wrote on its trunk again, to be trained on.

    Raises:
        AdapterError: It cannot be read.
    """
    try:
        return PeftModel.from_pretrained(trunk, str(directory), is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as exc:
        raise AdapterError(f"the LoRA in {directory} cannot be loaded: {exc}") from exc


def save_lora(model: Any, directory: Path) -> None:
    """Write a LoRA as PEFT does, without its trunk."""
    model.save_pretrained(str(directory))


def is_lora(model: Any) -> bool:
    """Whether a model is a LoRA on a trunk."""
    return isinstance(model, PeftModel)
