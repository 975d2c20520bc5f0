"""Adapters, routes and rollouts through the admin API and the command line, on a real engine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway_process import RunningGateway
from tiny_models import TinyModels, write_llama, write_manifest, write_tokenizer

pytestmark = pytest.mark.engine


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.client() as made:
        yield made


def complete(client: httpx.Client, model: str) -> Any:
    body = {"model": model, "prompt": "t1 t2 t3", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()


def cut_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def other_bytes(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def with_pickle(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    write_manifest(directory, "bad")


def foreign_tokenizer(directory: Path) -> None:
    shutil.rmtree(directory)
    write_llama(directory, seed=9, num_layers=1, width=32, vocab_size=100, max_length=512)
    write_tokenizer(directory, 100)


def nan_weights(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_manifest(directory, "bad")


def remote_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (directory / "config.json").write_text(json.dumps(config))
    write_manifest(directory, "bad")


def short_context(directory: Path) -> None:
    shutil.rmtree(directory)
    write_llama(directory, seed=9, num_layers=1, width=32, max_length=64)
    write_tokenizer(directory)


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    write_manifest(directory, "bad")


@pytest.mark.parametrize(
    ("spoil", "code", "word"),
    [
        (cut_weights, "integrity", "model.safetensors"),
        (other_bytes, "integrity", "model.safetensors"),
        (with_pickle, "unsafe_file", "safetensors"),
        (foreign_tokenizer, "vocabulary_mismatch", "tokenizer"),
        (nan_weights, "invalid_weights", "NaN"),
        (remote_code, "unsafe_file", "auto_map"),
        (short_context, "invalid_adapter", "64"),
        (broken_config, "invalid_manifest", "config.json"),
    ],
)
def test_a_bad_version_directory_is_refused_and_what_was_serving_goes_on(
    client: httpx.Client, tiny_models: TinyModels, tmp_path: Path, spoil: Callable[[Path], None], code: str, word: str
) -> None:
    before = complete(client, "adapter")
    directory = Path(shutil.copytree(tiny_models.adapter, tmp_path / "bad"))
    spoil(directory)
    answer = client.post("/admin/adapters", json={"name": "bad", "path": str(directory), "route": "adapter"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], set(error)) == (code, {"message", "type", "param", "code"})
    assert word in error["message"]
    assert "bad" not in {adapter["name"] for adapter in client.get("/admin/adapters").json()["data"]}
    after = complete(client, "adapter")
    assert after["choices"] == before["choices"]
    assert after["steering"] == before["steering"]


def test_a_directory_that_is_not_there_is_refused(client: httpx.Client) -> None:
    answer = client.post("/admin/adapters", json={"name": "bad", "path": "/nowhere/at/all"})
    assert answer.status_code in (400, 404)
    assert "/nowhere/at/all" in answer.json()["error"]["message"]


def trimtab(gateway: RunningGateway, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab_server.cli", *arguments, "--url", gateway.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout if status == 0 else done.stderr


def test_the_life_of_an_adapter_on_the_command_line(
    gateway: RunningGateway, client: httpx.Client, tiny_models: TinyModels, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"  # a directory as save_pretrained leaves it, without a manifest
    write_llama(plain, seed=21, num_layers=1, width=64, max_length=512)
    write_tokenizer(plain)
    trimtab(gateway, "adapters", "add", "life", str(plain), "--route", "life")
    write_llama(plain, seed=22, num_layers=1, width=64, max_length=512)
    trimtab(gateway, "adapters", "add", "life", str(plain))
    listed = json.loads(trimtab(gateway, "adapters", "list", "--json"))
    first, second = (row["version"] for row in listed if row["name"] == "life")
    assert complete(client, "life")["steering"]["adapters"][0]["version"] == first

    trimtab(gateway, "adapters", "activate", "life", "--route", "life")
    assert complete(client, "life")["steering"]["adapters"][0]["version"] == second
    assert "in use" in trimtab(gateway, "adapters", "retire", "life", second, status=1)
    trimtab(gateway, "adapters", "rollback", "--route", "life")
    assert complete(client, "life")["steering"]["adapters"][0]["version"] == first

    trimtab(gateway, "adapters", "retire", "life", second)
    body = {"model": "base", "prompt": "t1", "steering": {"adapters": [{"name": "life", "version": second}]}}
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "retired" in refused.json()["error"]["message"]
    engine = client.get("/admin/engines").json()["data"][0]["status"]
    assert second not in {version["version"] for version in engine["versions"]}, "its memory is given back"

    history = json.loads(trimtab(gateway, "routes", "history", "life", "--json"))
    assert [revision["steering"][0]["version"] for revision in history] == [first, second, first]
    trimtab(gateway, "routes", "delete", "life")
    assert client.post("/v1/completions", json={"model": "life", "prompt": "t1"}).status_code == 404


def test_rollouts_are_exported_to_parquet_and_jsonl(
    gateway: RunningGateway, client: httpx.Client, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    complete(client, "other")
    for form in ("parquet", "jsonl"):
        target = tmp_path / f"rollouts.{form}"
        trimtab(gateway, "rollouts", "export", "--format", form, "--output", str(target), "--route", "other")
        rows = (
            pq.read_table(target).to_pylist()
            if form == "parquet"
            else [json.loads(line) for line in target.read_text().splitlines()]
        )
        assert rows
        assert {row["route"] for row in rows} == {"other"}
        assert all(len(row["output_token_ids"]) == len(row["base_logprobs"]) for row in rows)


def test_the_command_line_says_how_to_start_a_server_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab_server.cli", "adapters", "list", "--url", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "trimtab serve" in done.stderr
    assert "Traceback" not in done.stderr
