import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typing_extensions import override

from steering_reference import VOCAB_SIZE, base_description, live_bytes, load, params, wait
from tiny_models import TinyModels, write_llama, write_manifest, write_tokenizer
from trimtab_adapters import residents as residents_module
from trimtab_adapters.adapter_lm import Backend, load_adapter_lm, read_adapter_lm
from trimtab_adapters.contract.errors import AdapterError, ConflictError, NotFoundError
from trimtab_adapters.dense_ops import Linear, TorchOps
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeringCore

CPU = torch.device("cpu")


def test_a_prepared_version_is_not_used_until_it_is_committed(residents: Residents, tiny_models: TinyModels) -> None:
    version = tiny_models.manifest("adapter").version_id
    with pytest.raises(NotFoundError):
        residents.poll(version)
    residents.prepare(version, str(tiny_models.adapter))
    status = wait(residents, version)
    assert (status.state, status.name) == ("prepared", "adapter")
    assert version not in residents.committed
    assert residents.commit(version).state == "committed"
    assert residents.commit(version).state == "committed", "committing twice is harmless"
    weights = load_file(tiny_models.adapter / "model.safetensors").values()
    assert status.weight_bytes == sum(weight.numel() * weight.element_size() for weight in weights)


def test_a_retired_version_serves_its_rows_to_the_end_and_is_then_freed(
    residents: Residents, tiny_models: TinyModels
) -> None:
    version = load(residents, tiny_models.adapter)
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE)
    row = core.open(params("u", (version, 1.0)), [1, 2], [])
    adapter = residents.committed[version].adapter
    before = live_bytes()
    assert residents.retire(version) == 1
    assert core.open(params("new", (version, 1.0)), [1], []).error is not None
    result = core.step([(row, 0)], torch.zeros(1, VOCAB_SIZE))
    assert result is not None
    assert result.rows == [row]
    core.close(row)
    residents.sweep()
    assert residents.budget.allocated_bytes == 0
    assert before - live_bytes() >= adapter.weight_bytes, "given back even while somebody holds the adapter"
    assert residents.retire(version) == 0


def test_a_version_that_is_wanted_again_while_it_retires_is_kept(residents: Residents, tiny_models: TinyModels) -> None:
    version = load(residents, tiny_models.adapter)
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE)
    row = core.open(params("u", (version, 1.0)), [1, 2], [])
    residents.retire(version)
    residents.prepare(version, "/nowhere")
    residents.commit(version)
    core.close(row)
    residents.sweep()
    assert core.open(params("again", (version, 1.0)), [1], []).error is None


@pytest.fixture
def copy(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.adapter, tmp_path / "copy"))


def refusal(residents: Residents, directory: Path, version: str | None = None) -> tuple[str, str]:
    version = version or write_manifest(directory, "adapter").version_id
    residents.prepare(version, str(directory))
    status = wait(residents, version)
    assert status.state == "failed"
    with pytest.raises(ConflictError):
        residents.commit(version)
    return str(status.error_code), str(status.error)


def test_another_content_than_the_version_says_is_refused(residents: Residents, copy: Path) -> None:
    code, message = refusal(residents, copy, "0123456789abcdef")
    assert code == "invalid_manifest"
    assert "not 0123456789abcdef" in message


def test_missing_weights_are_refused(residents: Residents, copy: Path) -> None:
    version = write_manifest(copy, "adapter").version_id
    (copy / "model.safetensors").unlink()
    assert refusal(residents, copy, version)[0] == "invalid_adapter"


def test_nan_weights_are_refused(residents: Residents, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    code, message = refusal(residents, copy)
    assert code == "invalid_weights"
    assert "lm_head.weight" in message


def test_another_tokenizer_is_refused(residents: Residents, tmp_path: Path) -> None:
    directory = tmp_path / "foreign"
    write_llama(directory, seed=1, num_layers=1, width=32, vocab_size=100)
    write_tokenizer(directory, 100)
    code, message = refusal(residents, directory)
    assert code == "vocabulary_mismatch"
    assert "100 tokens" in message


def test_a_short_context_and_an_unknown_prefix_are_refused(residents: Residents, tmp_path: Path) -> None:
    directory = tmp_path / "short"
    write_llama(directory, seed=1, num_layers=1, width=32, max_length=255)
    write_tokenizer(directory)
    assert "255 positions" in refusal(residents, directory)[1]
    write_manifest(directory, "adapter", prefix=[500])
    version = write_manifest(directory, "adapter", prefix=[500]).version_id
    assert "prefix token ids [500]" in refusal(residents, directory, version)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"sliding_window": 8}),
        ("Gemma", {"head_dim": 16}),
    ],
)
def test_families_that_run_as_adapter_lms(
    family: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    config_class, model_class = (
        getattr(transformers, f"{family}Config"),
        getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel"),
    )
    common = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = config_class(
        **(options | {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0} if family == "GPT2" else common | options)
    )
    model_class(config).to(dtype).save_pretrained(tmp_path)
    adapter = load_adapter_lm(tmp_path, CPU)  # compares itself with the family's own forward pass
    assert adapter.geometry.dtype == dtype
    assert adapter.num_logits == 97


def test_an_attention_that_would_be_wrong_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"gemma2 .* soft-capped"):
        load_adapter_lm(tmp_path, CPU)


def test_the_base_description_counts_tokens(tiny_models: TinyModels) -> None:
    assert base_description(tiny_models.base).num_tokens == 128


def test_the_engines_operators_are_used_on_the_workers_thread_alone(tiny_models: TinyModels) -> None:
    """vLLM's CPU operators share scratch memory: in two threads at once they corrupt numbers or end the process."""
    threads: set[int] = set()

    class Recording(TorchOps):
        @override
        def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
            threads.add(threading.get_ident())
            product = super().linear(weight, bias)

            def run(x: torch.Tensor) -> torch.Tensor:
                threads.add(threading.get_ident())
                return product(x)

            return run

    base = base_description(tiny_models.base)
    residents = Residents(base, CPU, kv_bytes=1 << 24, dtype=torch.float32, backend=Backend(dense=Recording()))
    load(residents, tiny_models.adapter)
    assert threads == {threading.get_ident()}


def test_a_version_is_checked_in_small_steps(residents: Residents, tiny_models: TinyModels) -> None:
    version = tiny_models.manifest("adapter").version_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residents_module, "_CHECK_SLICE_S", 0.0)
        residents.prepare(version, str(tiny_models.adapter))
        residents._loading[version].future.result()
        num_polls = 1
        while residents.poll(version).state == "loading":
            num_polls += 1
    assert num_polls > tiny_models_layers(tiny_models)


def tiny_models_layers(tiny_models: TinyModels) -> int:
    layers: int = json.loads((tiny_models.adapter / "config.json").read_text())["num_hidden_layers"]
    return layers


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_reading_gives_way_to_decoding(
    residents: Residents, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []
    read, usual_s = read_adapter_lm, sys.getswitchinterval()

    def noting(*args: Any, **options: Any) -> Any:
        seen.append((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), sys.getswitchinterval()))
        return read(*args, **options)

    monkeypatch.setattr(residents_module, "read_adapter_lm", noting)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    load(residents, tiny_models.adapter)
    for thread in threading.enumerate():
        if thread.name.startswith("load-"):
            thread.join(30)
    ((priority, interval_s),) = seen
    assert (priority, interval_s < usual_s) == (19, True)
    assert sys.getswitchinterval() == usual_s
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
