"""LoRAs on their way into the store and the engine: what is taken, what is refused, and what a version then holds."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_directories import PREFIX, write_lora, write_model
from steering_reference import wait
from tiny_models import write_manifest
from trimtab_adapters.adapter_lm import load_adapter_lm
from trimtab_adapters.contract.errors import (
    AdapterError,
    IntegrityError,
    ManifestError,
    UnsafeFileError,
    VocabularyError,
)
from trimtab_adapters.contract.lora import read_lora_config
from trimtab_adapters.contract.manifest import LORA_CONFIG_FILE, LORA_WEIGHTS_FILE, MANIFEST_FILE, Manifest
from trimtab_adapters.residents import Residents
from trimtab_adapters.store import VersionStore

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path / "store")


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    return write_model(tmp_path / "trunk", "Llama", seed=1)


@pytest.fixture
def lora(tmp_path: Path, trunk: Path) -> Path:
    return write_lora(tmp_path / "lora", trunk, seed=2)


def set_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_version_holds_the_trunk_and_the_lora_under_names_that_mislead_nobody(
    store: VersionStore, trunk: Path, lora: Path
) -> None:
    manifest, path = store.add(lora, name="kind", trunk=trunk, default_alpha=0.5)
    names = sorted(p.name for p in path.iterdir())
    assert names == sorted([*manifest.files, MANIFEST_FILE])
    assert {LORA_CONFIG_FILE, LORA_WEIGHTS_FILE, "config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert "adapter_config.json" not in names
    assert manifest.lora is not None
    assert (manifest.lora.r, manifest.lora.lora_alpha, manifest.default_alpha) == (4, 8.0, 0.5)
    again, _ = store.add(lora, name="kind", trunk=trunk, default_alpha=0.5)
    assert again.version_id == manifest.version_id
    assert store.open(manifest.version_id)[0] == manifest
    renamed, _ = store.add(path, name="other")  # a version directory needs no trunk: it is in it
    assert renamed.lora == manifest.lora


def test_versions_of_one_trunk_share_its_file_on_disk(store: VersionStore, trunk: Path, tmp_path: Path) -> None:
    paths = [store.add(write_lora(tmp_path / f"l{n}", trunk, seed=n), name="kind", trunk=trunk)[1] for n in range(3)]
    assert len({os.stat(path / "model.safetensors").st_ino for path in paths}) == 1
    assert len({os.stat(path / LORA_WEIGHTS_FILE).st_ino for path in paths}) == 3
    store.remove(paths[0].name)
    for path in paths[1:]:
        store.open(path.name)


def test_a_damaged_file_in_the_store_is_not_linked_to(store: VersionStore, trunk: Path, tmp_path: Path) -> None:
    first = store.add(write_lora(tmp_path / "l1", trunk, seed=1), name="kind", trunk=trunk)[1] / "model.safetensors"
    first.chmod(0o644)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    manifest, _ = store.add(write_lora(tmp_path / "l2", trunk, seed=2), name="kind", trunk=trunk)
    store.open(manifest.version_id)


def test_a_version_directory_can_be_a_trunk(store: VersionStore, trunk: Path, lora: Path) -> None:
    plain, _ = store.add(lora, name="kind", trunk=trunk)
    write_manifest(trunk, "small")
    (trunk / "tokenizer.json").unlink()  # then its manifest says which tokenizer it has
    fields = json.loads((trunk / MANIFEST_FILE).read_text())
    (trunk / MANIFEST_FILE).write_text(json.dumps(fields | {"files": _without(fields, "tokenizer.json")}))
    manifest, _ = store.add(lora, name="kind", trunk=trunk)
    assert manifest.lora == plain.lora
    assert manifest.vocabulary_sha256 == plain.vocabulary_sha256


def test_a_manifest_without_a_lora_keeps_its_id() -> None:
    """The id that the same fields had before LoRAs were known, worked out with the code of that time."""
    entry = {"sha256": "a" * 64, "size_bytes": 1}
    files = {"config.json": entry, "model.safetensors": entry}
    manifest = Manifest.model_validate({"name": "kind", "vocabulary_sha256": "b" * 64, "vocab_size": 3, "files": files})
    assert b"lora" not in manifest.canonical_json()
    assert "lora" not in manifest.model_dump()
    assert manifest.version_id == "91f6d52c8f39d091"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"bias": "all"}, "biases"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "token embeddings"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "replicated"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"alora_invocation_tokens": [5]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"a_setting_of_tomorrow": True}, "a_setting_of_tomorrow"),
        ({"r": 0}, "rank 0"),
        ({"r": True}, "rank True"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 4}}, "only names"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "nan"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(
    store: VersionStore, trunk: Path, lora: Path, change: dict[str, Any], message: str
) -> None:
    set_config(lora, **change)
    with pytest.raises(ManifestError, match="(?i)" + message.replace("(", r"\(")):
        store.add(lora, name="kind", trunk=trunk)
    assert [path for path in store.root.iterdir() if not path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "change", [{"init_lora_weights": "gaussian"}, {"a_setting_of_tomorrow": None}, {"lora_dropout": 0}]
)
def test_settings_that_change_nothing_are_taken(
    store: VersionStore, trunk: Path, lora: Path, change: dict[str, Any]
) -> None:
    set_config(lora, **change)
    store.add(lora, name="kind", trunk=trunk)


def test_ranks_and_scalings_follow_the_patterns(lora: Path) -> None:
    # By PEFT's rule: the first pattern that is the end of the name, or all of it after ^.
    set_config(
        lora,
        r=4,
        lora_alpha=8,
        rank_pattern={"layers.1.self_attn.q_proj": 16, "q_proj": 2, "^v_proj": 9},
        alpha_pattern={f"^{Q}": 3, "v_proj": 5},
    )
    config = read_lora_config(lora / "adapter_config.json")
    other_q, v = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    assert [config.rank(name) for name in (Q, other_q, v, "model.qq_proj")] == [2, 16, 4, 4]
    assert [config.scaling(name) for name in (Q, other_q, v)] == [3 / 2, 8 / 16, 5 / 4]
    set_config(lora, use_rslora=True)
    assert read_lora_config(lora / "adapter_config.json").scaling(other_q) == 8 / 4


def test_a_directory_that_is_not_a_lora_with_its_trunk_is_refused(
    store: VersionStore, trunk: Path, lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match="--trunk"):
        store.add(lora, name="kind")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json is missing"):
        store.add(trunk, name="kind", trunk=trunk)
    with pytest.raises(ManifestError, match="a trunk is a whole model"):
        store.add(lora, name="kind", trunk=lora)
    _, path = store.add(lora, name="kind", trunk=trunk)
    with pytest.raises(ManifestError, match="a LoRA itself"):
        store.add(lora, name="kind", trunk=path)
    with pytest.raises(ManifestError, match="version directory"):
        store.add(path, name="kind", trunk=trunk)
    (lora / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UnsafeFileError, match="pickle"):
        store.add(lora, name="kind", trunk=trunk)


def test_a_tokenizer_with_other_tokens_beside_the_lora_is_refused(store: VersionStore, trunk: Path, lora: Path) -> None:
    content = json.loads((trunk / "tokenizer.json").read_text())
    (lora / "tokenizer.json").write_text(json.dumps(content))
    store.add(lora, name="kind", trunk=trunk)
    content["model"]["vocab"]["<new>"] = 128
    (lora / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match="129 tokens"):
        store.add(lora, name="kind", trunk=trunk)


def test_a_manifest_that_hides_or_invents_a_lora_is_refused(store: VersionStore, trunk: Path, lora: Path) -> None:
    manifest, _ = store.add(lora, name="kind", trunk=trunk)
    fields = manifest.model_dump(mode="json")
    for change in (
        {"lora": fields["lora"] | {"trunk_sha256": "0" * 64}},
        {"files": _without(fields, LORA_CONFIG_FILE)},
    ):
        with pytest.raises(ValueError, match="lora"):
            Manifest.model_validate(fields | change)
    hidden = Path(store.root.parent / "hidden")
    write_model(hidden, "Llama", seed=1)
    (hidden / LORA_CONFIG_FILE).write_text("{}")
    write_manifest(hidden, "hidden")
    with pytest.raises(ManifestError, match="says nothing of a LoRA"):
        store.add(hidden, name="kind")
    (hidden / LORA_CONFIG_FILE).rename(hidden / "adapter_config.json")
    write_manifest(hidden, "hidden")
    with pytest.raises(UnsafeFileError, match=r"adapter_config\.json"):
        store.add(hidden, name="kind")
    with pytest.raises(AdapterError, match="PEFT"):
        load_adapter_lm(hidden, torch.device("cpu"))


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields["files"].items() if key != name}


def poison(weights: dict[str, Any]) -> None:
    weights[f"{PREFIX}{Q}.lora_B.weight"][0, 0] = math.nan


def test_nan_weights_are_refused_by_the_store(store: VersionStore, trunk: Path, lora: Path) -> None:
    change_weights(lora, poison)
    with pytest.raises(AdapterError, match="NaN"):
        store.add(lora, name="kind", trunk=trunk)


def rename(new: str) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        weights[new] = weights.pop(f"{PREFIX}{Q}.lora_A.weight")

    return change


def drop(weights: dict[str, Any]) -> None:
    for side in "AB":
        del weights[f"{PREFIX}{Q}.lora_{side}.weight"]


def add_pair(module: str, shape_down: tuple[int, int], shape_up: tuple[int, int]) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        weights[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(shape_down)
        weights[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(shape_up)

    return change


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (rename(f"{PREFIX}model.embed_tokens.lora_embedding_A"), "invalid_adapter", "updates of embeddings are not"),
        (rename(f"{PREFIX}{Q}.lora_magnitude_vector"), "invalid_adapter", "DoRA is not"),
        (rename(f"{PREFIX}lm_head.weight"), "invalid_adapter", "only LoRAs of linear layers"),
        (rename(f"{Q}.lora_A.weight"), "invalid_adapter", "only LoRAs of linear layers"),
        (lambda w: w.pop(f"{PREFIX}{Q}.lora_A.weight"), "invalid_weights", "only lora_B"),
        (drop, "invalid_weights", f"no update of {Q}"),
        (add_pair(Q, (5, 64), (64, 5)), "invalid_weights", "its rank is 4"),
        (add_pair(Q, (4, 63), (64, 4)), "invalid_weights", "(64, 63) (out, in), this one has (64, 64)"),
        (add_pair("lm_head", (4, 64), (128, 4)), "invalid_adapter", "lm_head"),
        (add_pair("model.layers.2.self_attn.q_proj", (4, 64), (64, 4)), "invalid_adapter", "layers.2"),
    ],
)
def test_weights_that_do_not_go_with_the_trunk_are_refused_when_they_are_loaded(
    residents: Residents, store: VersionStore, trunk: Path, lora: Path, change: Any, code: str, message: str
) -> None:
    change_weights(lora, change)
    manifest, path = store.add(lora, name="kind", trunk=trunk)
    residents.prepare(manifest.version_id, str(path))
    status = wait(residents, manifest.version_id)
    assert (status.state, status.error_code) == ("failed", code), status
    assert message in str(status.error)
    assert residents.weight_status().used_bytes == 0


def test_layers_that_store_their_weights_transposed_are_refused(
    residents: Residents, store: VersionStore, tmp_path: Path
) -> None:
    options = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    gpt2 = write_model(tmp_path / "gpt2", "GPT2", seed=1, **options)
    manifest, path = store.add(
        write_lora(tmp_path / "lora", gpt2, seed=1, targets=("c_attn",)), name="kind", trunk=gpt2
    )
    residents.prepare(manifest.version_id, str(path))
    assert "c_attn, which is not one of the linear layers" in str(wait(residents, manifest.version_id).error)
