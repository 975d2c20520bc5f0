"""What may lie in an adapter version directory, and what each file must look like.

Nothing here follows a link out of the directory, unpickles, or runs code that came with a model.
"""

import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import (
    IntegrityError,
    ManifestError,
    UnsafeFileError,
    VocabularyError,
    WeightsError,
)
from trimtab_adapters.contract.lora import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, read_lora_config
from trimtab_adapters.contract.manifest import (
    LORA_CONFIG_FILE,
    LORA_FILES,
    LORA_WEIGHTS_FILE,
    MANIFEST_FILE,
    Manifest,
    read_vocabulary,
    vocabulary_fingerprint,
)
from trimtab_adapters.weights_file import check_weights_file

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
LISTED_SUFFIXES = frozenset(
    {".safetensors", ".json", ".jsonl", ".txt", ".md", ".jinja", ".model", ".csv", ".png", ".svg"}
)
"""What a manifest may list: data that is parsed and never executed."""
COPIED_NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    }
)
"""What is taken from a directory without a manifest, besides its safetensors files and their index."""
INDEX_SUFFIX = ".safetensors.index.json"
_CONFIG_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
_CAUSAL_LM_ENDINGS = ("ForCausalLM", "LMHeadModel")


def list_files(directory: Path) -> dict[str, Path]:
    """The plain files at the top of a directory, by name. Sub-directories are never looked into.

    Raises:
        IntegrityError: It is not a readable directory.
        UnsafeFileError: A pickle, or a link that leaves the directory.
    """
    files: dict[str, Path] = {}
    try:
        root = directory.resolve(strict=True)
        for path in sorted(root.iterdir()):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UnsafeFileError(
                    f"{path.name} is a link that leaves the directory; copy the files themselves (`cp -rL`) and "
                    "register the copy"
                )
            if not stat.S_ISREG(path.stat().st_mode):
                continue
            if path.suffix.lower() in PICKLE_SUFFIXES:
                raise UnsafeFileError(
                    f"{path.name} may hold a pickle, which can run code when it is read: safetensors only. Save the "
                    "weights as safetensors and remove it from the directory"
                )
            files[path.name] = path
    except OSError as exc:
        raise IntegrityError(f"{directory} is not a directory that can be read here: {exc.strerror}") from exc
    return files


def select_files(files: dict[str, Path]) -> list[str]:
    """Names that make a version out of a directory without a manifest.

    Raises:
        IntegrityError: Configuration or weights are missing.
        ManifestError: It holds a LoRA, which would be left out silently.
    """
    if PEFT_CONFIG_FILE in files or files.keys() & LORA_FILES:
        raise ManifestError(
            f"{PEFT_CONFIG_FILE}: this is a LoRA, not a whole model. Register it with the directory of the LM that it "
            "was trained on as its trunk (`trimtab adapters add NAME LORA --trunk LM`); a trunk is a whole model itself"
        )
    names = [n for n in files if n in COPIED_NAMES or n.endswith((".safetensors", INDEX_SUFFIX))]
    if "config.json" not in files:
        raise IntegrityError("config.json is missing; save the adapter LM with transformers' `save_pretrained`")
    if not any(name.endswith(".safetensors") for name in names):
        raise IntegrityError("there is no *.safetensors file; save the adapter LM with transformers' `save_pretrained`")
    return sorted(names)


def select_lora_files(
    files: dict[str, Path], trunk: dict[str, Path], trunk_manifest: Manifest | None
) -> dict[str, Path]:
    """What makes a version out of a PEFT directory and its trunk's: source files by their names in the version.

    Raises:
        IntegrityError: Configuration or weights are missing.
        ManifestError: The one is not a LoRA as PEFT saves it, or the other not a whole model.
    """
    if MANIFEST_FILE in files:
        raise ManifestError(f"{MANIFEST_FILE}: this is a version directory, which has its trunk in it or needs none")
    for name in (PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE):
        if name not in files:
            raise IntegrityError(f"{name} is missing; a trunk goes with a LoRA as PEFT's `save_pretrained` leaves it")
    if trunk_manifest is not None:
        if trunk_manifest.lora is not None:
            raise ManifestError("the trunk is a LoRA itself; name the directory of the LM that both were trained on")
        trunk = {name: path for name, path in trunk.items() if name in trunk_manifest.files}
    names = select_files(trunk)
    return {name: trunk[name] for name in names if name not in LORA_FILES} | {
        LORA_CONFIG_FILE: files[PEFT_CONFIG_FILE],
        LORA_WEIGHTS_FILE: files[PEFT_WEIGHTS_FILE],
    }


def check_listed_names(manifest: Manifest) -> None:
    """Raises `UnsafeFileError` when a manifest lists a kind of file that has no place in a version."""
    for name in manifest.files:
        suffix = Path(name).suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise UnsafeFileError(f"{MANIFEST_FILE} lists {name}, which may hold a pickle: safetensors only")
        if suffix not in LISTED_SUFFIXES:
            allowed = ", ".join(sorted(LISTED_SUFFIXES))
            raise UnsafeFileError(f"{MANIFEST_FILE} lists {name}; a version may only hold files ending in {allowed}")
    if PEFT_CONFIG_FILE in manifest.files:
        raise UnsafeFileError(f"{MANIFEST_FILE} lists {PEFT_CONFIG_FILE}, which makes transformers load another model")
    if manifest.lora is None and (found := sorted(LORA_FILES & manifest.files.keys())):
        raise ManifestError(f"{MANIFEST_FILE} lists {', '.join(found)} but says nothing of a LoRA")


def check_configuration(directory: Path, names: Iterable[str]) -> None:
    """Check the configuration files of a causal LM, and of a LoRA on it.

    Raises:
        UnsafeFileError: One asks for code from the model's directory or hub.
        ManifestError: `config.json` is not JSON, or not of a causal LM; the LoRA is of a kind that is not supported.
    """
    present = set(names)
    if LORA_CONFIG_FILE in present:
        read_lora_config(directory / LORA_CONFIG_FILE)
    for name in _CONFIG_FILES:
        if name in present:
            config = _read_json(directory / name)
            if found := next((key for key in _keys(config) if key in _CODE_KEYS), None):
                raise UnsafeFileError(
                    f"{name} has {found!r}: the model needs code of its own, which is never run here. Use an "
                    "architecture that transformers knows"
                )
    config = _read_json(directory / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ManifestError("config.json names no model_type; save the model with transformers' `save_pretrained`")
    architectures = config.get("architectures") or []
    is_causal = isinstance(architectures, list) and any(str(a).endswith(_CAUSAL_LM_ENDINGS) for a in architectures)
    if config.get("is_encoder_decoder") or not is_causal:
        raise ManifestError(
            f"config.json is not of a causal LM: its architectures are {architectures}; an adapter LM must be one such "
            "as LlamaForCausalLM or GPT2LMHeadModel"
        )


def check_vocabulary(
    directory: Path, names: Iterable[str], manifest: Manifest | None, expected: tuple[str, int] | None
) -> tuple[str, int]:
    """Fingerprint and number of tokens of the version's tokenizer.

    Args:
        directory: The version directory.
        names: Its files.
        manifest: Says the fingerprint when there is no `tokenizer.json`, and must agree with it when there is.
        expected: Those of the base model; None leaves the comparison to the engine.

    Raises:
        VocabularyError: No fingerprint can be had, or it is not the expected one.
        ManifestError: Manifest and `tokenizer.json` disagree.
    """
    if "tokenizer.json" in set(names):
        vocabulary = read_vocabulary(directory)
        found = (vocabulary_fingerprint(vocabulary), len(vocabulary))
        if manifest is not None and (manifest.vocabulary_sha256, manifest.vocab_size) != found:
            raise ManifestError(
                f"the manifest's vocabulary ({manifest.vocab_size} tokens, {manifest.vocabulary_sha256[:12]}) is not "
                f"that of tokenizer.json ({found[1]} tokens, {found[0][:12]})"
            )
    elif manifest is not None:
        found = (manifest.vocabulary_sha256, manifest.vocab_size)
    else:
        raise VocabularyError(
            "tokenizer.json is missing, so the vocabulary cannot be checked; save the tokenizer beside the weights "
            "(`tokenizer.save_pretrained`), or add a manifest.json with its fingerprint"
        )
    if expected is not None and found[0] != expected[0]:
        raise VocabularyError(
            f"the adapter LM's tokenizer ({found[1]} tokens, {found[0][:12]}) is not the base model's ({expected[1]} "
            f"tokens, {expected[0][:12]}); an adapter LM must be trained with the base model's own tokenizer"
        )
    return found


def check_weights(directory: Path, names: Iterable[str]) -> None:
    """Check every safetensors file and that an index matches them.

    Raises:
        WeightsError: A file is not readable safetensors, or holds NaN or infinite numbers.
        IntegrityError: The index names a file or a tensor that is not there.
    """
    present = sorted(names)
    tensors = {name: set(check_weights_file(directory / name)) for name in present if name.endswith(".safetensors")}
    for index in (name for name in present if name.endswith(INDEX_SUFFIX)):
        content = _read_json(directory / index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise WeightsError(f"{index} has no weight_map")
        for tensor, file_name in weight_map.items():
            if file_name not in tensors:
                raise IntegrityError(f"{index} names {file_name}, which is missing")
            if tensor not in tensors[file_name]:
                raise IntegrityError(f"{index} places {tensor!r} in {file_name}, which does not hold it")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ManifestError(f"{path.name} is not readable JSON: {exc}") from exc


def _keys(value: Any) -> Iterator[str]:
    """All keys at any depth, without recursion."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
