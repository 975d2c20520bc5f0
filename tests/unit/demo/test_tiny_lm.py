import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab_adapters.contract.manifest import read_vocabulary, vocabulary_fingerprint
from trimtab_training.demo import tiny_lm, world

TINY = tiny_lm.DemoSettings(
    vocab_size=400,
    train_length=64,
    num_documents=200,
    base=tiny_lm.LmSettings(64, 2, 2, 128, 16 * 8 * 64),
    adapter=tiny_lm.LmSettings(32, 1, 1, 64, 8 * 8 * 64),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other make these tests ten times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_settings_make_identical_files_and_another_seed_others(tmp_path: Path) -> None:
    first = tiny_lm.build(TINY, cache_dir=tmp_path / "a")
    second = tiny_lm.build(TINY, cache_dir=tmp_path / "b")
    other = tiny_lm.build(replace(TINY, seed=1), cache_dir=tmp_path / "a")
    assert _hashes(first.base) == _hashes(second.base)
    assert _hashes(first.adapter) == _hashes(second.adapter)
    assert (first.base_loss, first.adapter_loss) == (second.base_loss, second.adapter_loss)
    assert _hashes(first.base)["model.safetensors"] != _hashes(other.base)["model.safetensors"]


def test_a_finished_build_is_found_again_and_leaves_nothing_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny_lm.build(TINY, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [built.base.parent.name]

    def fail(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(tiny_lm, "_make", fail)
    assert tiny_lm.build(TINY, cache_dir=tmp_path) == built


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_settings: object, directory: Path, _report: object) -> None:
        (directory / "half").write_text("")
        raise RuntimeError("no space")

    monkeypatch.setattr(tiny_lm, "_make", fail)
    with pytest.raises(RuntimeError, match="no space"):
        tiny_lm.build(TINY, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_key_changes_with_every_setting() -> None:
    keys = {
        tiny_lm.cache_key(settings)
        for settings in (TINY, replace(TINY, seed=1), replace(TINY, base=replace(TINY.base, num_layers=3)))
    }
    assert len(keys) == 3


def test_training_lowers_the_loss_below_that_of_uniform_guesses(tmp_path: Path) -> None:
    built = tiny_lm.build(TINY, cache_dir=tmp_path)
    assert built.base_loss < torch.log(torch.tensor(400.0)).item() - 1.0


def test_base_and_adapter_have_one_tokenizer_with_end_of_text_as_0(tmp_path: Path) -> None:
    built = tiny_lm.build(TINY, cache_dir=tmp_path)
    vocabulary = read_vocabulary(built.base)
    assert vocabulary_fingerprint(vocabulary) == vocabulary_fingerprint(read_vocabulary(built.adapter))
    assert vocabulary[tiny_lm.END_OF_TEXT] == 0
    tokenizer = AutoTokenizer.from_pretrained(built.base)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    model = AutoModelForCausalLM.from_pretrained(built.base)
    assert model.config.vocab_size == len(vocabulary)
    assert model.config.eos_token_id == 0
    assert not list(built.base.glob("*.bin"))


@pytest.mark.parametrize("text", [world.documents(9, 1)[0], "Grüße, 世界! \x00\t\r\n  two  spaces", ""])
def test_the_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = tiny_lm.train_tokenizer(world.documents(0, 50), 400)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_random_models_load_and_share_a_tokenizer_but_not_their_weights(arch: tiny_lm.Arch, tmp_path: Path) -> None:
    one = tiny_lm.build_random(tmp_path / "one", arch=arch, seed=1)
    same = tiny_lm.build_random(tmp_path / "same", arch=arch, seed=1)
    two = tiny_lm.build_random(tmp_path / "two", seed=2, hidden_size=32, num_heads=1, num_layers=1)
    assert _hashes(one) == _hashes(same)
    assert read_vocabulary(one) == read_vocabulary(two)
    model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    assert probabilities.shape == (len(read_vocabulary(one)),)
    assert probabilities.max() > 5 / len(probabilities)  # clearly uneven


def test_bfloat16_and_a_missing_chat_template_are_kept(tmp_path: Path) -> None:
    directory = tiny_lm.build_random(tmp_path / "m", dtype="bfloat16", chat_template=None)
    assert AutoModelForCausalLM.from_pretrained(directory).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(directory).chat_template is None


def test_the_chat_template_writes_roles_and_ends_with_the_assistant(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.build_random(tmp_path / "m"))
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: Hello\nassistant:"
