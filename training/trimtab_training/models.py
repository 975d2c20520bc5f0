"""The language models of a training run: loaded, checked against each other, and given Quark's control tokens."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from trimtab_adapters.contract.errors import (
    AdapterError,
    InvalidRequestError,
    ManifestError,
    VocabularyError,
    WeightsError,
)
from trimtab_adapters.contract.manifest import MANIFEST_FILE, read_manifest, read_vocabulary, vocabulary_fingerprint
from trimtab_adapters.contract.params import VersionId
from trimtab_training.lora_training import is_lora, save_lora

CONTROL_TOKENS_KEY = "control_token_ids"
"""Key in a manifest's `training` under which the control tokens stand, best quantile first."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer that base and adapter share.

    Attributes:
        path: Its `tokenizer.json`.
        sha256: Fingerprint of the vocabulary.
        size: Number of its tokens.
        num_tokens: One more than its largest id; the same unless ids are left out.
        tokenizer: Encodes as the base model's tokenizer does.
    """

    path: Path
    sha256: str
    size: int
    num_tokens: int
    tokenizer: Tokenizer

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(text).ids)


@dataclass(frozen=True, slots=True)
class AdapterStart:
    """What training starts from.

    Attributes:
        model: The adapter LM, with one embedding row per control token.
        control_token_ids: One id per quantile, best first; all beyond the tokenizer's vocabulary. None without
            quantiles.
        fixed_prefix: What the adapter sees after the control token, if there is one, and before the prompt: the parent
            version's system prompt, usually nothing; without quantiles all that the parent version begins with.
        parent: The version that it continues; None for a plain model.
    """

    model: Any
    control_token_ids: tuple[int, ...]
    fixed_prefix: tuple[int, ...]
    parent: VersionId | None


def load_vocabulary(directory: Path) -> Vocabulary:
    """Read a base model directory's tokenizer.

    Raises:
        VocabularyError: There is no readable `tokenizer.json`.
    """
    vocabulary = read_vocabulary(directory)
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the tokenizers library raises nothing more special
        raise VocabularyError(f"{path} cannot be loaded as a tokenizer: {exc}") from exc
    return Vocabulary(
        path=path,
        sha256=vocabulary_fingerprint(vocabulary),
        size=len(vocabulary),
        num_tokens=max(vocabulary.values()) + 1,
        tokenizer=tokenizer,
    )


def load_causal_lm(directory: Path, *, dtype: torch.dtype, device: str) -> Any:
    """Load a causal LM from a local directory, safetensors only, no remote code.

    Raises:
        AdapterError: It is not a directory that transformers can load.
        WeightsError: Weights are missing or do not fit the configuration.
    """
    return _load(AutoModelForCausalLM, "a causal LM", directory, dtype, device)


def load_base_lm(directory: Path, *, dtype: torch.dtype, device: str) -> Any:
    """Load a base model, which may be an encoder-decoder one. Otherwise as `load_causal_lm`."""
    if not _has_encoder(directory):
        return load_causal_lm(directory, dtype=dtype, device=device)
    return _load(AutoModelForSeq2SeqLM, "an encoder-decoder LM", directory, dtype, device)


def _has_encoder(directory: Path) -> bool:
    """Whether a directory's configuration is that of an encoder-decoder model; False where there is none to read."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return False  # loading will say what is wrong
    return bool(config.is_encoder_decoder)


def _load(auto: Any, what: str, directory: Path, dtype: torch.dtype, device: str) -> Any:
    if not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory; download the model first and name its local directory")
    try:
        model, report = auto.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, json.JSONDecodeError) as exc:
        raise AdapterError(f"{directory} cannot be loaded as {what}: {exc}") from exc
    missing, mismatched = sorted(map(str, report["missing_keys"])), sorted(map(str, report["mismatched_keys"]))
    if missing or mismatched:
        raise WeightsError(f"{directory}: missing weights {missing[:3]}, wrong shapes {mismatched[:3]}")
    return model


def load_adapter_start(
    directory: Path,
    vocabulary: Vocabulary,
    *,
    num_bins: int,
    seed: int,
    device: str,
    control_token_ids: tuple[int, ...] | None = None,
    can_grow: bool = True,
    start_scale: float = 1.0,
) -> AdapterStart:
    """Load the adapter LM to train and see to its control tokens, one for each of `num_bins` quantiles.

    They are `control_token_ids` where given, which are tokens that the LM has; else those of a version that was trained
    with as many quantiles; else new rows are added. Without quantiles (0) the adapter stays as it is, and so does what
    it sees before a prompt.

    Args:
        directory: A plain causal LM or an adapter version.
        vocabulary: The base model's.
        num_bins: Number of quantiles.
        seed: Of new control tokens.
        device: Torch device.
        control_token_ids: Tokens of the LM that stand for the quantiles.
        can_grow: Whether rows may be added to the LM's embeddings.
        start_scale: What the logits of a plain model are multiplied by, see `scale_logits`.

    Raises:
        AdapterError: It cannot be loaded, or it needs new rows and must not grow (`can_grow`).
        VocabularyError: It was made for another tokenizer, or nothing says for which.
        InvalidRequestError: A version, which goes on from where it was, is to be scaled.
    """
    manifest = read_manifest(directory) if (directory / MANIFEST_FILE).exists() else None
    if manifest is not None and manifest.lora is not None:
        raise ManifestError(f"{directory} is a LoRA, which training cannot start from; merge it into its trunk first")
    fingerprint = manifest.vocabulary_sha256 if manifest else vocabulary_fingerprint(read_vocabulary(directory))
    if fingerprint != vocabulary.sha256:
        raise VocabularyError(f"{directory} has another tokenizer than the base model; the token ids must be the same")
    model = load_causal_lm(directory, dtype=torch.float32, device=device)
    if num_output_columns(model) < vocabulary.num_tokens:
        raise VocabularyError(
            f"{directory} has logits for {num_output_columns(model)} tokens, the tokenizer has {vocabulary.num_tokens}"
        )
    if start_scale != 1.0:
        if manifest is not None:
            raise InvalidRequestError(
                f"models.start_scale is for a plain model; {directory} is an adapter version, which it would undo"
            )
        scale_logits(model, start_scale)
    parent = manifest.version_id if manifest else None
    prefix = tuple(manifest.prefix_token_ids) if manifest else ()
    if not num_bins:
        return AdapterStart(model, (), prefix, parent)
    former = _known_control_tokens(manifest.training if manifest else {})
    fixed = tuple(token for token in prefix if token not in former)
    if control_token_ids is not None:
        if max(control_token_ids) >= int(model.get_input_embeddings().weight.shape[0]):
            raise AdapterError(f"{directory} has no token {max(control_token_ids)}: see objective.control_token_ids")
        former = control_token_ids
    elif len(former) != num_bins:
        if not can_grow:
            raise AdapterError(
                f"{directory} has no {num_bins} control tokens, and a LoRA cannot add any to it; name tokens that it "
                "has and does not otherwise use in objective.control_token_ids"
            )
        former = add_control_tokens(model, num_bins, num_known=vocabulary.num_tokens, seed=seed)
    return AdapterStart(model, former, fixed, parent)


def scale_logits(model: Any, factor: float) -> None:
    """Multiply all logits of a causal LM by `factor`, by way of its final norm.

    With a small factor an adapter LM says nearly the same of every token, so that the tailored policy begins close to
    the base, whatever alpha is; its inner layers stay as they were trained.

    Raises:
        AdapterError: The model has no final norm that its logits are proportional to.
    """
    norms = [
        module
        for name, module in model.base_model.named_modules()
        if not any(part.isdigit() for part in name.split("."))
        and (own := list(module.parameters(recurse=False)))
        and all(parameter.ndim == 1 for parameter in own)
    ]
    if not norms:
        raise AdapterError(f"{type(model).__name__} has no final norm, so models.start_scale cannot be applied")
    probe = torch.arange(min(4, num_output_columns(model)), device=model.device)[None]
    with torch.no_grad():
        before = model(input_ids=probe, use_cache=False).logits.float()
        for parameter in norms[-1].parameters(recurse=False):
            parameter.mul_(factor)
        after = model(input_ids=probe, use_cache=False).logits.float()
    if not torch.allclose(after, factor * before, rtol=1e-3, atol=1e-4 * factor * float(before.abs().max())):
        raise AdapterError(
            f"the logits of {type(model).__name__} do not follow its final norm; leave models.start_scale at 1"
        )


def add_control_tokens(model: Any, num: int, *, num_known: int, seed: int) -> tuple[int, ...]:
    """Append `num` rows to the embedding table (and the output layer) and return their ids.

    Each dimension of a new row is drawn from Normal(mean, standard deviation) of that dimension over the first
    `num_known` rows, as Quark and IPA do. The output layer grows with it because transformers keeps both the same
    size; those columns are cut off before every softmax.
    """
    first = int(model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(first + num, mean_resizing=False)
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    with torch.no_grad():
        if output.weight is not table:  # set first: tied tables are one and the same
            output.weight[first:] = 0.0
        if getattr(output, "bias", None) is not None:
            output.bias[first:] = 0.0
        known = table[:num_known].double().cpu()
        noise = torch.randn(num, known.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        table[first:] = (known.mean(dim=0) + known.std(dim=0) * noise).to(table)
    return tuple(range(first, first + num))


def turn_off_dropout(model: Any) -> None:
    """Make a model compute the same in training as in evaluation; its configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # Llama's kind has a number and no module
            module.attention_dropout = 0.0


def num_output_columns(model: Any) -> int:
    """Width of a causal LM's logits."""
    return int(model.get_output_embeddings().weight.shape[0])


def max_positions(model: Any) -> int | None:
    """Most tokens that a causal LM's positions allow; None when its configuration names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def end_token_ids(model: Any) -> frozenset[int]:
    """Tokens with which a model ends its output, from its generation settings or its configuration."""
    found: set[int] = set()
    for settings in (getattr(model, "generation_config", None), model.config):
        value = getattr(settings, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)


def save_causal_lm(model: Any, directory: Path, tokenizer_json: Path) -> None:
    """Write configuration, safetensors weights and the tokenizer into a directory; of a LoRA, PEFT's files alone.

    Raises:
        WeightsError: A weight is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise WeightsError(f"weight {name} holds NaN or infinite values; lower the learning rate")
    if is_lora(model):
        save_lora(model, directory)
        return
    model.save_pretrained(directory)
    shutil.copyfile(tokenizer_json, directory / "tokenizer.json")


def _known_control_tokens(training: dict[str, Any]) -> tuple[int, ...]:
    ids = training.get(CONTROL_TOKENS_KEY, [])
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ManifestError(f"the manifest's training.{CONTROL_TOKENS_KEY} must list token ids")
    return tuple(ids)
