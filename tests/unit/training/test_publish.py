import hashlib
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from trimtab_adapters.contract.errors import IntegrityError, NotFoundError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_adapters.store import VersionStore
from trimtab_training.models import Vocabulary, add_control_tokens, load_causal_lm
from trimtab_training.publish import VersionInfo, register_version, temporary_version, write_version
from trimtab_training.rollouts import NO_OPERATORS

INFO = VersionInfo("a", 0.8, (64,), {"objective": "quark"}, reward="lucky@9", evaluation={"win_rate": 0.7})


@pytest.fixture
def model(model_dirs: dict[str, Path]) -> Any:
    model = load_causal_lm(model_dirs["adapter"], dtype=torch.float32, device="cpu")
    add_control_tokens(model, 2, num_known=64, seed=0)
    return model


def test_a_version_directory_is_complete_and_named_by_its_content(
    model: Any, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    directory = write_version(tmp_path / "store", model, vocabulary, INFO)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [directory.version]
    manifest = read_manifest(directory.path)
    assert manifest == directory.manifest
    assert (manifest.name, manifest.default_alpha, manifest.prefix_token_ids) == ("a", 0.8, [64])
    assert (manifest.vocab_size, manifest.vocabulary_sha256) == (64, vocabulary.sha256)
    assert (manifest.reward, manifest.evaluation) == ("lucky@9", {"win_rate": 0.7})
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.files)
    assert set(manifest.files) | {"manifest.json"} == set(os.listdir(directory.path))
    for name, entry in manifest.files.items():
        content = (directory.path / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.size_bytes)
    assert json.loads((directory.path / "config.json").read_text())["vocab_size"] == 66


def test_the_gateways_store_accepts_it_under_the_same_id(model: Any, vocabulary: Vocabulary, tmp_path: Path) -> None:
    directory = write_version(tmp_path / "ours", model, vocabulary, INFO)
    manifest, _ = VersionStore(tmp_path / "theirs").add(
        directory.path, name="a", expected_vocabulary=(vocabulary.sha256, vocabulary.num_tokens)
    )
    assert manifest.version_id == directory.version


def test_registering_checks_that_the_gateway_found_the_same(
    model: Any, vocabulary: Vocabulary, tmp_path: Path, gateway: Any
) -> None:
    directory = write_version(tmp_path, model, vocabulary, INFO)
    with gateway.client() as client:
        assert register_version(client, directory) == directory.version
        assert gateway.bodies("/admin/adapters") == [{"name": "a", "path": str(directory.path)}]
        gateway.answers = [httpx.Response(200, json={"version": "0" * 16})]
        with pytest.raises(IntegrityError, match="instead of"):
            register_version(client, directory)


def test_a_temporary_version_is_retired_and_deleted_even_after_an_error(
    model: Any, vocabulary: Vocabulary, tmp_path: Path, gateway: Any
) -> None:
    def fail_inside(client: Any) -> None:
        with temporary_version(client, tmp_path, model, vocabulary, INFO) as named:
            assert list(gateway.versions) == [named.version]
            alone = {"adapters": [{"name": "a", "version": named.version, "alpha": 0.8}]}
            assert named.steering == alone | NO_OPERATORS, "a route's operators must not leak into what is drawn"
            raise RuntimeError("draw")

    with gateway.client() as client, pytest.raises(RuntimeError, match="draw"):
        fail_inside(client)
    assert gateway.retired == list(gateway.versions)
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_cannot_be_retired_does_not_lose_what_was_drawn(
    model: Any, vocabulary: Vocabulary, tmp_path: Path, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with gateway.client() as client, temporary_version(client, tmp_path, model, vocabulary, INFO):
        gateway.answers = [httpx.Response(409, json={"error": {"message": "in use"}})]
    assert "could not be retired" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_refused_version_leaves_nothing_behind(
    model: Any, vocabulary: Vocabulary, tmp_path: Path, gateway: Any
) -> None:
    gateway.answers = [httpx.Response(404, json={"error": {"message": "no"}})]
    with (
        gateway.client() as client,
        pytest.raises(NotFoundError),
        temporary_version(client, tmp_path, model, vocabulary, INFO),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
