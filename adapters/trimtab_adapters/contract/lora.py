"""A LoRA's configuration as PEFT writes it (`adapter_config.json`), and which of them can be run.

The update of one linear layer is `scaling * B A` with `A` `[r, in]` and `B` `[out, r]`
(https://huggingface.co/docs/peft, "LoRA"). What else PEFT can do is refused by name. So is a setting that is not known
here and is switched on: it may change the forward pass.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import ManifestError

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"

_REFUSED = {
    "use_dora": "DoRA (weight-decomposed updates)",
    "modules_to_save": "whole modules saved beside the LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "updates of parameters that are not linear layers",
    "layer_replication": "replicated layers",
    "lora_bias": "biases in the LoRA",
    "fan_in_fan_out": "layers that store their weights transposed (Conv1D, as in GPT-2)",
    "megatron_config": "Megatron's parallel layers",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "arrow_config": "Arrow's routing",
}
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("peft_version", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
        # Read only by features that are switched on elsewhere, or while training.
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "qalora_group_size", "runtime_config"),
    }
)
_KEPT_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the trunk's own weights as they were."""
_PATTERN = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of a PEFT configuration the forward pass depends on.

    Attributes:
        r: Rank where `rank_pattern` says nothing.
        lora_alpha: Numerator of the scaling where `alpha_pattern` says nothing.
        use_rslora: Divide it by the square root of the rank instead of the rank.
        rank_pattern: Rank by the end of a module's name, the first that fits; `^` ties it to the name's beginning.
        alpha_pattern: The same for `lora_alpha`.
        required_modules: Ends of names of linear layers that all must have an update; empty where this is not said.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    required_modules: tuple[str, ...]

    def rank(self, module: str) -> int:
        """Rank of a module's update."""
        key = _fitting(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def scaling(self, module: str) -> float:
        """What a module's `B A` is multiplied by."""
        key = _fitting(self.alpha_pattern, module)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_config(path: Path) -> LoraConfig:
    """Read a PEFT configuration.

    Raises:
        ManifestError: It is not readable, not of a LoRA, or asks for something that is not supported.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ManifestError(f"{PEFT_CONFIG_FILE} is not readable JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ManifestError(f"{PEFT_CONFIG_FILE} is not a JSON object")
    _refuse_unsupported(content)
    targets = content.get("target_modules")
    is_partial = content.get("layers_to_transform") is not None or content.get("exclude_modules")
    return LoraConfig(
        r=_rank(content.get("r")),
        lora_alpha=_alpha(content.get("lora_alpha")),
        use_rslora=content.get("use_rslora") is True,
        rank_pattern={key: _rank(n) for key, n in _patterns(content, "rank_pattern")},
        alpha_pattern={key: _alpha(a) for key, a in _patterns(content, "alpha_pattern")},
        required_modules=tuple(str(t) for t in targets) if isinstance(targets, list) and not is_partial else (),
    )


def _refuse_unsupported(content: Mapping[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise ManifestError(
            f"{PEFT_CONFIG_FILE} is of the type {content.get('peft_type')!r}; of PEFT's methods only LORA is supported"
        )
    if content.get("task_type") not in (None, "CAUSAL_LM"):
        raise ManifestError(f"{PEFT_CONFIG_FILE} is for the task {content['task_type']!r}, not CAUSAL_LM")
    if content.get("bias", "none") != "none":
        raise ManifestError(f"{PEFT_CONFIG_FILE} has bias {content['bias']!r}: trained biases are not supported")
    switched_on = {key for key, value in content.items() if value not in (None, False, "", [], {})}
    for key, what in _REFUSED.items():
        if key in switched_on:
            raise ManifestError(
                f"{PEFT_CONFIG_FILE} has {key}: {what} are not supported in a LoRA on a shared LM. Merge it (PEFT's "
                "`merge_and_unload`), save that and register it as a model of its own"
            )
    initial = content.get("init_lora_weights")
    if not any(initial is kept or (isinstance(initial, str) and initial == kept) for kept in _KEPT_BASE):
        raise ManifestError(
            f"{PEFT_CONFIG_FILE} has init_lora_weights {initial!r}, which changes the LM under the LoRA; save it "
            "converted to a plain LoRA (PEFT's `path_initial_model_for_weight_conversion`)"
        )
    if unknown := sorted(switched_on - _HARMLESS - set(_REFUSED)):
        raise ManifestError(
            f"{PEFT_CONFIG_FILE} has {', '.join(unknown)}, which is not known here and may change what it computes"
        )


def _patterns(content: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    patterns = content.get(key) or {}
    if not isinstance(patterns, dict):
        raise ManifestError(f"{PEFT_CONFIG_FILE}: {key} is not an object")
    # PEFT takes regular expressions. Running foreign ones could stall the engine; names are what people write there.
    if bad := [pattern for pattern in patterns if not _PATTERN.fullmatch(pattern)]:
        raise ManifestError(
            f"{PEFT_CONFIG_FILE}: {key} has {bad[0]!r}; only names of modules are supported, no other expressions"
        )
    return list(patterns.items())


def _rank(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ManifestError(f"{PEFT_CONFIG_FILE}: the rank {value!r} is not a positive whole number")
    return value


def _alpha(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ManifestError(f"{PEFT_CONFIG_FILE}: the lora_alpha {value!r} is not a finite number")
    return float(value)


def _fitting(patterns: Mapping[str, Any], module: str) -> str | None:
    for pattern in patterns:
        if pattern.startswith("^"):
            if module == pattern[1:]:
                return pattern
        elif module == pattern or module.endswith("." + pattern):
            return pattern
    return None
