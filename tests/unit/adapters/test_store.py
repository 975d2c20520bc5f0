"""The version store: what it takes, what it refuses, and that what it holds stays as it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trimtab_adapters.contract.errors import (
    AdapterError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    UnsafeFileError,
    VocabularyError,
    WeightsError,
)
from trimtab_adapters.contract.manifest import MANIFEST_FILE, Manifest, vocabulary_fingerprint
from trimtab_adapters.store import VersionStore
from version_directories import VOCABULARY, float32, make_model_directory, write_safetensors


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_model_directory(tmp_path / "source")


@pytest.fixture
def published(store: VersionStore, source: Path, tmp_path: Path) -> Path:
    """A directory with a manifest, as a training run would leave it."""
    _, stored = store.add(source, name="kind", training={"objective": "quark"})
    directory = tmp_path / "published"
    shutil.copytree(stored, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def entries(store: VersionStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def test_a_model_directory_becomes_a_version_with_a_manifest(store: VersionStore, source: Path) -> None:
    (source / "README.md").write_text("left out")
    manifest, path = store.add(source, name="kind", prefix_token_ids=[7], default_alpha=-0.5, training={"lr": 1})
    assert path == store.root / manifest.version_id
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (manifest.name, manifest.prefix_token_ids, manifest.default_alpha) == ("kind", [7], -0.5)
    assert (manifest.vocab_size, manifest.vocabulary_sha256) == (3, vocabulary_fingerprint(VOCABULARY))
    assert manifest.training == {"lr": 1}
    assert entries(store) == [manifest.version_id]


def test_the_same_directory_gives_the_same_version_again(store: VersionStore, source: Path) -> None:
    first = store.add(source, name="kind")
    assert store.add(source, name="kind") == first
    assert entries(store) == [first[0].version_id]


def test_another_name_prefix_alpha_or_weight_gives_another_version(
    store: VersionStore, source: Path, tmp_path: Path
) -> None:
    other = make_model_directory(tmp_path / "other", weight=1.5)
    ids = {
        store.add(source, name="kind")[0].version_id,
        store.add(source, name="calm")[0].version_id,
        store.add(source, name="kind", prefix_token_ids=[1])[0].version_id,
        store.add(source, name="kind", default_alpha=2.0)[0].version_id,
        store.add(other, name="kind")[0].version_id,
    }
    assert len(ids) == 5


def test_a_directory_with_a_manifest_keeps_its_identity(store: VersionStore, published: Path) -> None:
    stated = Manifest.model_validate_json((published / MANIFEST_FILE).read_bytes())
    manifest, _ = store.add(published, name="kind")
    assert manifest == stated


def test_what_the_caller_asks_for_replaces_what_the_manifest_says(store: VersionStore, published: Path) -> None:
    manifest, _ = store.add(published, name="calm", default_alpha=3.0)
    assert (manifest.name, manifest.default_alpha, manifest.training) == ("calm", 3.0, {"objective": "quark"})


def test_a_sharded_model_is_taken_with_its_index(store: VersionStore, source: Path) -> None:
    (source / "model.safetensors").unlink()
    write_safetensors(source / "model-1.safetensors", {"a": float32([1.0])})
    write_safetensors(source / "model-2.safetensors", {"b": float32([2.0])})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest, _ = store.add(source, name="kind")
    assert {"model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"} <= set(manifest.files)
    (source / "model-2.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"names model-2\.safetensors, which is missing"):
        store.add(source, name="kind")


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def link_outside(directory: Path) -> None:
    secret = directory.parent / "secret.json"
    secret.write_text("{}")
    (directory / "vocab.json").symlink_to(secret)


def half_index(directory: Path) -> None:
    index = {"weight_map": {"missing": "model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


CONFIG = '{"model_type": "llama", "architectures": ["%s"]%s}'


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("config.json"), IntegrityError, r"config\.json is missing"),
        (remove("model.safetensors"), IntegrityError, r"no \*\.safetensors file"),
        (remove("tokenizer.json"), VocabularyError, r"tokenizer\.json is missing"),
        (write("pytorch_model.bin", "x"), UnsafeFileError, "safetensors only"),
        (write("weights.PT", "x"), UnsafeFileError, "safetensors only"),
        (write("optimizer.pkl", "x"), UnsafeFileError, "safetensors only"),
        (link_outside, UnsafeFileError, "link that leaves the directory"),
        (write("adapter_config.json", "{}"), ManifestError, "LoRA"),
        (write("config.json", "[1"), ManifestError, "not readable JSON"),
        (write("config.json", "[]"), ManifestError, "no model_type"),
        (write("config.json", CONFIG % ("BertForMaskedLM", "")), ManifestError, "not of a causal LM"),
        (write("config.json", CONFIG % ("LlamaForCausalLM", ', "is_encoder_decoder": true')), ManifestError, "causal"),
        (write("config.json", CONFIG % ("XForCausalLM", ', "auto_map": {}')), UnsafeFileError, "code of its own"),
        (write("tokenizer_config.json", '{"a": [{"auto_map": 1}]}'), UnsafeFileError, "code of its own"),
        (write("tokenizer.json", "{}"), VocabularyError, "not a readable tokenizer"),
        (write("model.safetensors", "\x80\x04pickled"), WeightsError, "not a safetensors file"),
        (half_index, IntegrityError, "does not hold it"),
    ],
)
def test_a_bad_model_directory_is_refused_and_leaves_nothing(
    store: VersionStore,
    source: Path,
    damage: Callable[[Path], object],
    error: type[AdapterError],
    message: str,
) -> None:
    damage(source)
    with pytest.raises(error, match=message):
        store.add(source, name="kind")
    assert not store.root.exists() or entries(store) == []


def rewrite_manifest(**changes: object) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / MANIFEST_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def list_file(name: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / MANIFEST_FILE
        manifest = json.loads(path.read_text())
        manifest["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
        path.write_text(json.dumps(manifest))

    return change


def flip_last_byte(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (write(MANIFEST_FILE, "{"), ManifestError, "not a valid manifest"),
        (rewrite_manifest(schema_version=2), ManifestError, "schema_version"),
        (rewrite_manifest(surprise=1), ManifestError, "surprise"),
        (rewrite_manifest(vocab_size=9), ManifestError, "not that of tokenizer.json"),
        (remove("model.safetensors"), IntegrityError, r"model\.safetensors: listed in manifest\.json but missing"),
        (flip_last_byte, IntegrityError, "SHA-256"),
        (write("config.json", "{}"), IntegrityError, "has 2 bytes"),
        (list_file("model.bin"), UnsafeFileError, "may hold a pickle"),
        (list_file("modeling.py"), UnsafeFileError, "may only hold"),
        (list_file("../escape.json"), ManifestError, "plain file name"),
        (write("unlisted.pth", "x"), UnsafeFileError, "safetensors only"),
    ],
)
def test_a_bad_version_directory_is_refused_and_leaves_nothing(
    store: VersionStore,
    published: Path,
    damage: Callable[[Path], object],
    error: type[AdapterError],
    message: str,
) -> None:
    before = entries(store)
    damage(published)
    with pytest.raises(error, match=message):
        store.add(published, name="kind")
    assert entries(store) == before


def test_a_directory_without_tokenizer_is_taken_when_its_manifest_has_the_fingerprint(
    store: VersionStore, published: Path
) -> None:
    path = published / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    del manifest["files"]["tokenizer.json"]
    path.write_text(json.dumps(manifest))
    (published / "tokenizer.json").unlink()
    fingerprint = (vocabulary_fingerprint(VOCABULARY), 3)
    assert store.add(published, name="kind", expected_vocabulary=fingerprint)[0].vocab_size == 3


def test_another_tokenizer_than_the_base_models_is_refused_with_both_sizes(store: VersionStore, source: Path) -> None:
    base = {**VOCABULARY, "more": 3}
    with pytest.raises(VocabularyError, match=r"3 tokens.*4 tokens"):
        store.add(source, name="kind", expected_vocabulary=(vocabulary_fingerprint(base), 4))


# Bit patterns: sign, all exponent bits, and for NaN a fraction bit.
@pytest.mark.parametrize(
    ("dtype", "bits", "bad", "largest"),
    [
        ("F16", 16, 0x7E00, 0x7BFF),
        ("F16", 16, 0xFC00, 0xFBFF),
        ("BF16", 16, 0x7FC0, 0x7F7F),
        ("BF16", 16, 0xFF80, 0xFF7F),
        ("F32", 32, 0x7FC00000, 0x7F7FFFFF),
        ("F32", 32, 0xFF800000, 0xFF7FFFFF),
        ("F64", 64, 0x7FF8000000000000, 0x7FEFFFFFFFFFFFFF),
        ("F64", 64, 0x7FF0000000000000, 0x0010000000000000),
        ("F8_E4M3", 8, 0x7F, 0x7E),
        ("F8_E4M3", 8, 0xFF, 0x78),
        ("F8_E5M2", 8, 0x7C, 0x7B),
    ],
)
def test_nan_and_infinity_are_found_in_every_type_and_the_largest_number_is_not_one(
    store: VersionStore, source: Path, dtype: str, bits: int, bad: int, largest: int
) -> None:
    values = np.zeros(1000, dtype=f"<u{bits // 8}")
    values[-1] = largest
    write_safetensors(source / "model.safetensors", {"a": (dtype, [1000], values.tobytes())})
    store.add(source, name="kind")
    values[-1] = bad
    write_safetensors(source / "model.safetensors", {"a": (dtype, [1000], values.tobytes())})
    with pytest.raises(WeightsError, match="'a' holds NaN"):
        store.add(source, name="kind")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ("{}", b"", "holds no tensor"),
        ("nonsense", b"", "not JSON"),
        ("[]", b"", "not an object"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 3, "cut off"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 5, "after its last tensor"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"\0" * 8, "hole"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"\0" * 4, "does not fit"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"\0" * 4, "bad entry"),
        ('{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4, "cannot be checked"),
        ('{"a": {}}', b"", "bad entry"),
        ('{"a": {}, "a": {}}', b"", "twice"),
    ],
)
def test_a_malformed_safetensors_file_is_refused(
    store: VersionStore, source: Path, header: str, data: bytes, message: str
) -> None:
    raw = header.encode()
    (source / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with pytest.raises(WeightsError, match=message):
        store.add(source, name="kind")


def test_what_the_safetensors_library_writes_is_taken(store: VersionStore, source: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {"a": np.ones((3, 5), np.float16), "ids": np.arange(4), "empty": np.zeros((0, 2), np.float32)}
    save_file(arrays, source / "model.safetensors", metadata={"format": "pt"})
    store.add(source, name="kind")


def test_open_returns_what_was_added(store: VersionStore, source: Path) -> None:
    added = store.add(source, name="kind")
    assert store.open(added[0].version_id) == added


def test_open_finds_a_file_that_changed_and_adding_again_mends_it(store: VersionStore, source: Path) -> None:
    manifest, path = store.add(source, name="kind")
    (path / "model.safetensors").chmod(0o644)
    flip_last_byte(path)
    with pytest.raises(IntegrityError, match="changed or damaged"):
        store.open(manifest.version_id)
    store.add(source, name="kind")
    assert store.open(manifest.version_id) == (manifest, path)
    assert entries(store) == [manifest.version_id]


def test_open_refuses_a_directory_under_another_versions_name(store: VersionStore, source: Path) -> None:
    _, path = store.add(source, name="kind")
    path.rename(store.root / ("0" * 16))
    with pytest.raises(ManifestError, match="holds the version"):
        store.open("0" * 16)


@pytest.mark.parametrize("version", ["0" * 16, "../source", "..", "", "0" * 15])
def test_open_and_remove_know_only_versions(store: VersionStore, source: Path, version: str) -> None:
    store.add(source, name="kind")
    with pytest.raises(NotFoundError):
        store.open(version)
    with pytest.raises(NotFoundError):
        store.remove(version)
    assert source.exists()


def test_remove_deletes_a_version(store: VersionStore, source: Path) -> None:
    manifest, _ = store.add(source, name="kind")
    store.remove(manifest.version_id)
    assert entries(store) == []


def test_what_a_killed_process_left_is_swept_and_a_running_one_is_left_alone(store: VersionStore, source: Path) -> None:
    store.root.mkdir()
    for name in (".incoming-old", ".incoming-new", ".removed-x"):
        (store.root / name).mkdir()
    os.utime(store.root / ".incoming-old", (0, 0))
    manifest, _ = store.add(source, name="kind")
    assert entries(store) == [".incoming-new", manifest.version_id]


def test_a_missing_source_and_a_bad_name_are_refused(store: VersionStore, source: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not a directory"):
        store.add(tmp_path / "nowhere", name="kind")
    with pytest.raises(ManifestError, match="name"):
        store.add(source, name="../kind")
    with pytest.raises(ManifestError, match="default_alpha"):
        store.add(source, name="kind", default_alpha=float("nan"))


def test_links_inside_the_directory_are_followed(store: VersionStore, source: Path) -> None:
    (source / "weights").mkdir()
    (source / "model.safetensors").rename(source / "weights" / "blob")
    (source / "model.safetensors").symlink_to("weights/blob")
    _, path = store.add(source, name="kind")
    assert not (path / "model.safetensors").is_symlink()
