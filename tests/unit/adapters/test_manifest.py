"""The manifest: its identity, its bounds, and the fingerprint of a vocabulary."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab_adapters.contract.errors import ManifestError, VocabularyError
from trimtab_adapters.contract.manifest import (
    Manifest,
    read_manifest,
    read_vocabulary,
    vocabulary_fingerprint,
)

ENTRY = {"sha256": "a" * 64, "size_bytes": 1}
FIELDS: dict[str, Any] = {
    "name": "kind",
    "vocabulary_sha256": "b" * 64,
    "vocab_size": 3,
    "files": {"config.json": ENTRY, "model.safetensors": ENTRY},
}


def test_the_version_id_is_the_hash_of_sorted_compact_json() -> None:
    manifest = Manifest.model_validate(FIELDS)
    expected = json.dumps(manifest.model_dump(), sort_keys=True, separators=(",", ":")).encode()
    assert manifest.version_id == hashlib.sha256(expected).hexdigest()[:16]


def test_the_version_id_does_not_depend_on_the_order_of_fields_and_survives_json() -> None:
    manifest = Manifest.model_validate(FIELDS)
    backwards = json.loads(json.dumps(manifest.model_dump()))
    assert Manifest.model_validate(dict(reversed(backwards.items()))).version_id == manifest.version_id


@pytest.mark.parametrize(
    "change",
    [
        {"name": "calm"},
        {"default_alpha": 2.0},
        {"prefix_token_ids": [1]},
        {"training": {"lr": 1}},
        {"created_at": "2026-01-01T00:00:00Z"},
        {"files": {**FIELDS["files"], "tokenizer.json": ENTRY}},
    ],
)
def test_everything_in_the_manifest_is_part_of_the_identity(change: dict[str, Any]) -> None:
    assert Manifest.model_validate({**FIELDS, **change}).digest != Manifest.model_validate(FIELDS).digest


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../kind"},
        {"default_alpha": float("nan")},
        {"default_alpha": 101.0},
        {"vocab_size": 0},
        {"prefix_token_ids": [-1]},
        {"files": {"config.json": ENTRY}},
        {"files": {"model.safetensors": ENTRY}},
        {"files": {**FIELDS["files"], "a/b": ENTRY}},
        {"files": {**FIELDS["files"], "manifest.json": ENTRY}},
        {"files": {**FIELDS["files"], "x.json": {"sha256": "A" * 64, "size_bytes": 1}}},
        {"unknown": 1},
    ],
)
def test_a_bad_manifest_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate({**FIELDS, **change})


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(tmp_path)


def test_the_fingerprint_is_the_hash_of_ids_with_their_tokens() -> None:
    expected = hashlib.sha256(b'[[0,"a"],[1,"\\u00e9"]]').hexdigest()
    assert vocabulary_fingerprint({"é": 1, "a": 0}) == expected
    assert vocabulary_fingerprint({"é": 0, "a": 1}) != expected


def test_a_vocabulary_is_read_with_its_added_tokens(tmp_path: Path) -> None:
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<x>", "id": 5}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_vocabulary(tmp_path) == {"a": 0, "<x>": 5}


def test_a_unigram_vocabulary_is_numbered_by_position(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}}))
    assert read_vocabulary(tmp_path) == {"<unk>": 0, "a": 1}


def test_a_directory_without_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="does not exist"):
        read_vocabulary(tmp_path)
