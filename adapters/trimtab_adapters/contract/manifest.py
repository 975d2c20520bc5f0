"""What an adapter version directory says about itself.

A version directory holds `manifest.json`, `config.json`, safetensors weights and, recommended, `tokenizer.json`.
It is immutable: its id is the hash of its manifest, and the manifest holds the hash of every other file.

A LoRA is a version too. Its directory holds all files of the LM that it acts on, the *trunk*, and the LoRA's own two
beside them. They do not have PEFT's names, by which transformers would load something else than the trunk from it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from trimtab_adapters.contract.errors import ManifestError, VocabularyError
from trimtab_adapters.contract.params import AdapterName, Alpha, VersionId

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
LORA_CONFIG_FILE = "lora_config.json"
"""PEFT's `adapter_config.json` in a version directory."""
LORA_WEIGHTS_FILE = "lora.safetensors"
"""PEFT's `adapter_model.safetensors` in a version directory."""
LORA_FILES = frozenset({LORA_CONFIG_FILE, LORA_WEIGHTS_FILE})

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """Hash and size of one file of a version directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Sha256
    size_bytes: int = Field(ge=0)


class LoraEntry(BaseModel):
    """That a version is a LoRA, and on what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trunk_sha256: Sha256
    """`trunk_fingerprint` of the directory's other files. Versions with the same one share the trunk's weights."""
    r: int = Field(gt=0)
    """PEFT's `r`; `rank_pattern` may say otherwise for single layers."""
    lora_alpha: float = Field(allow_inf_nan=False)
    """PEFT's `lora_alpha`. Not the alpha of a steering."""


class Manifest(BaseModel):
    """The content of `manifest.json`. Everything in it is covered by the version id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: AdapterName
    """Name of the adapter that this is a version of."""
    vocabulary_sha256: Sha256
    """`vocabulary_fingerprint` of the tokenizer that the adapter LM was made for."""
    vocab_size: int = Field(gt=0)
    """Number of tokens of that tokenizer. Rows of the embedding beyond it are padding or control tokens."""
    prefix_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list, max_length=4096)
    """What this adapter sees before prompt and output: a control token (Quark's best bin) or a system prompt."""
    default_alpha: Alpha = 1.0
    created_at: str = ""
    """ISO 8601, UTC. Empty when the directory was registered without one."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How it was trained: objective, hyperparameters, base and parent versions, data. Free form, for people."""
    reward: str | None = None
    """The reward it was trained for, with the reward's version."""
    calibrator: str | None = None
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Figures measured at the end of training."""
    lora: LoraEntry | None = None
    """Set for a LoRA. Left out of the JSON otherwise, so that versions from before it was known keep their ids."""
    files: dict[str, FileEntry]
    """Every other file of the directory, by its name."""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not name or Path(name).name != name or name in (".", "..", MANIFEST_FILE):
                raise ValueError(f"{name!r} is not a plain file name inside the version directory")
        if "config.json" not in files:
            raise ValueError("config.json is not listed")
        if not any(name.endswith(".safetensors") for name in files if name not in LORA_FILES):
            raise ValueError("no safetensors file is listed")
        return files

    @property
    def weight_file_bytes(self) -> int:
        """Size of the weights on disk: about what they take in memory, unless the engine changes their type."""
        return sum(entry.size_bytes for name, entry in self.files.items() if name.endswith(".safetensors"))

    @model_validator(mode="after")
    def _complete_lora(self) -> "Manifest":
        if self.lora is not None:
            if missing := sorted(LORA_FILES - set(self.files)):
                raise ValueError(f"a LoRA without {', '.join(missing)}")
            if self.lora.trunk_sha256 != trunk_fingerprint(self.files):
                raise ValueError("lora.trunk_sha256 is not that of the files listed")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_lora(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if fields.get("lora") is None:
            fields.pop("lora", None)
        return fields

    def canonical_json(self) -> bytes:
        """The bytes that the version id is the hash of."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical manifest, 64 hex digits."""
        return hashlib.sha256(self.canonical_json()).hexdigest()

    @property
    def version_id(self) -> VersionId:
        """The version's identity: the first 16 hex digits of `digest`."""
        return self.digest[:16]


def trunk_fingerprint(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over the names and hashes of what decides a LM's logits: configuration, weights and their index."""
    rows = sorted(
        (name, entry.sha256)
        for name, entry in files.items()
        if name not in LORA_FILES
        and (name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json")))
    )
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Parse `manifest.json` of a version directory, without looking at the other files.

    Raises:
        ManifestError: It is missing, not JSON, or does not fit the schema.
    """
    path = directory / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as exc:
        raise ManifestError(f"{path} does not exist") from exc
    except (ValidationError, ValueError, OSError) as exc:
        raise ManifestError(f"{path} is not a valid manifest: {exc}") from exc


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over (id, token) of a whole vocabulary, added tokens included.

    Two tokenizers with the same fingerprint give each id the same meaning, which is what adding logits needs.
    How text is split into tokens is the base model's affair: the adapter LM only ever sees ids.
    """
    rows = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def read_vocabulary(directory: Path) -> dict[str, int]:
    """Token -> id of a directory's `tokenizer.json`, as a fast tokenizer's `get_vocab()` gives it, without loading one.

    Raises:
        VocabularyError: There is no readable `tokenizer.json`.
    """
    path = directory / "tokenizer.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model_vocabulary = data["model"]["vocab"]
    except FileNotFoundError as exc:
        raise VocabularyError(f"{path} does not exist, so the vocabulary cannot be checked") from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise VocabularyError(f"{path} is not a readable tokenizer: {exc}") from exc
    if isinstance(model_vocabulary, dict):
        vocabulary = {str(token): int(index) for token, index in model_vocabulary.items()}
    else:  # Unigram models list [token, score] in id order
        vocabulary = {str(row[0]): index for index, row in enumerate(model_vocabulary)}
    for added in data.get("added_tokens", []):
        vocabulary[str(added["content"])] = int(added["id"])
    return vocabulary
