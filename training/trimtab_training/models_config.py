"""The two language models of a run, and how they are computed with."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab_adapters.contract.params import Alpha
from trimtab_training.config_section import ConfigSection


class LoraConfig(ConfigSection):
    """A LoRA is trained on the adapter LM, which stays as it is (PEFT's settings of the same names)."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by lora_alpha / r. Not the alpha of a steering."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the update, in training; of the objectives only Quark trains with any."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers with an update, by the ends of their names."""


class ModelsConfig(ConfigSection):
    """The two language models of the tailored policy."""

    base_model: Path
    """Directory of the frozen base LM (or of an approximate policy that stands in for it); needs `tokenizer.json`."""
    adapter: Path
    """Directory that the adapter LM starts from: a plain causal LM or an adapter version, which is then trained on."""
    alpha: Alpha = 1.0
    """Weight of the adapter's log-probabilities, in training, when drawing and as the version's default. Not 0."""
    start_scale: float = Field(default=1.0, gt=0, le=1)
    """What the logits of a plain adapter LM are multiplied by before training. An untrained adapter LM at alpha 1
    already bends the base towards what both find likely; with a small factor the policy begins close to the base."""
    device: str = "cpu"
    """Torch device of both models."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen base."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the adapter's forward and backward pass; its weights and the optimiser stay in float32."""
    gradient_checkpointing: bool = False
    """Compute the adapter's activations again in the backward pass: less memory, about a third more arithmetic."""
    pack_tokens: int | None = Field(default=None, ge=64)
    """Put rows one after another into sequences of this many tokens instead of padding them to a rectangle."""
    base_cache_gib: float = Field(default=0.0, ge=0)
    """Memory for the base's logits of rollouts, which are read again and again; 0 computes them each time."""
    lora: LoraConfig | None = None
    """Train a LoRA on the adapter LM instead of all of its weights."""

    @model_validator(mode="after")
    def _steers(self) -> Self:
        if self.alpha == 0.0:
            raise ValueError("alpha 0 leaves the base untouched, so there is nothing to train")
        if self.lora is not None and self.start_scale != 1.0:
            raise ValueError("start_scale changes the LM under a LoRA, which is published as it was")
        return self
