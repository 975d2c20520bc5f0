import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_adapters.contract.errors import AdapterError, InvalidRequestError, VocabularyError, WeightsError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.models import (
    Vocabulary,
    add_control_tokens,
    end_token_ids,
    load_adapter_start,
    load_causal_lm,
    load_vocabulary,
    save_causal_lm,
    scale_logits,
    turn_off_dropout,
)
from trimtab_training.publish import VersionInfo, write_version

NUM_TOKENS = 64


def load(directory: Path) -> object:
    return load_causal_lm(directory, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["adapter", "untied", "gpt2"])
def test_control_tokens_survive_saving_and_leave_the_other_rows_alone(
    model_dirs: dict[str, Path], vocabulary: Vocabulary, tmp_path: Path, name: str
) -> None:
    model = load_causal_lm(model_dirs[name], dtype=torch.float32, device="cpu")
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_control_tokens(model, 5, num_known=NUM_TOKENS, seed=3)
    assert ids == (64, 65, 66, 67, 68)
    save_causal_lm(model, tmp_path / "saved", vocabulary.path)
    again = load_causal_lm(tmp_path / "saved", dtype=torch.float32, device="cpu")
    assert json.loads((tmp_path / "saved/config.json").read_text())["vocab_size"] == 69
    assert (tmp_path / "saved/tokenizer.json").read_bytes() == vocabulary.path.read_bytes()
    assert torch.equal(again.get_input_embeddings().weight[:NUM_TOKENS], before)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    is_tied = name != "untied"
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == is_tied


def test_new_rows_have_the_tables_mean_and_deviation_per_dimension(model_dirs: dict[str, Path]) -> None:
    """4,000 rows: a sample mean is off by more than 5 standard errors (sd / 63) in one of 16 dimensions with odds under
    1e-5, a sample deviation by more than 5 standard errors (sd / 89) likewise; the seed is fixed besides."""
    model = load_causal_lm(model_dirs["adapter"], dtype=torch.float32, device="cpu")
    known = model.get_input_embeddings().weight.detach()[:NUM_TOKENS].clone()
    add_control_tokens(model, 4000, num_known=NUM_TOKENS, seed=0)
    new = model.get_input_embeddings().weight.detach()[NUM_TOKENS:]
    deviation = known.std(dim=0)
    assert bool(((new.mean(dim=0) - known.mean(dim=0)).abs() < 5 * deviation / 4000**0.5).all())
    assert bool(((new.std(dim=0) - deviation).abs() < 5 * deviation / 8000**0.5).all())


def test_the_seed_decides_the_new_rows(model_dirs: dict[str, Path]) -> None:
    rows = []
    for seed in (1, 1, 2):
        model = load_causal_lm(model_dirs["adapter"], dtype=torch.float32, device="cpu")
        add_control_tokens(model, 2, num_known=NUM_TOKENS, seed=seed)
        rows.append(model.get_input_embeddings().weight.detach()[NUM_TOKENS:])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_published_version_is_continued_with_its_control_tokens(
    model_dirs: dict[str, Path], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    start = load_adapter_start(model_dirs["adapter"], vocabulary, num_bins=3, seed=0, device="cpu")
    assert (start.control_token_ids, start.fixed_prefix, start.parent) == ((64, 65, 66), (), None)
    info = VersionInfo("a", 1.0, (64, 9, 8), {"control_token_ids": [64, 65, 66]})
    directory = write_version(tmp_path, start.model, vocabulary, info)
    again = load_adapter_start(directory.path, vocabulary, num_bins=3, seed=0, device="cpu")
    assert (again.control_token_ids, again.fixed_prefix) == ((64, 65, 66), (9, 8))
    assert again.parent == read_manifest(directory.path).version_id
    other = load_adapter_start(directory.path, vocabulary, num_bins=2, seed=0, device="cpu")
    assert (other.control_token_ids, other.fixed_prefix) == ((67, 68), (9, 8))


@pytest.mark.parametrize("name", ["adapter", "untied", "gpt2"])
def test_a_scaled_start_has_scaled_logits_and_begins_close_to_the_base(
    model_dirs: dict[str, Path], vocabulary: Vocabulary, name: str
) -> None:
    ids = torch.tensor([[5, 9, 30, 2]])
    plain, scaled = (
        load_adapter_start(model_dirs[name], vocabulary, num_bins=2, seed=0, device="cpu", start_scale=scale).model
        for scale in (1.0, 0.01)
    )
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits[..., :NUM_TOKENS] for model in (plain, scaled))
    # Through one matrix product in float32, so equal to its rounding.
    assert torch.allclose(after, 0.01 * before, rtol=1e-4, atol=1e-6)
    # KL(uniform-ish || uniform) falls with the square of the logits: by 1e-4, up to the third order.
    kl_before, kl_after = (
        (torch.log_softmax(logits, -1) + torch.log(torch.tensor(float(NUM_TOKENS)))).mul(logits.softmax(-1)).sum(-1)
        for logits in (before, after)
    )
    assert bool((kl_after < 1e-3 * kl_before.clamp(min=0.05)).all())


def test_a_version_is_not_scaled(model_dirs: dict[str, Path], vocabulary: Vocabulary, tmp_path: Path) -> None:
    start = load_adapter_start(model_dirs["adapter"], vocabulary, num_bins=0, seed=0, device="cpu")
    directory = write_version(tmp_path, start.model, vocabulary, VersionInfo("a", 1.0, (), {}))
    with pytest.raises(InvalidRequestError, match=r"models\.start_scale"):
        load_adapter_start(directory.path, vocabulary, num_bins=0, seed=0, device="cpu", start_scale=0.1)


def test_a_model_whose_logits_do_not_follow_its_norm_is_not_scaled(model_dirs: dict[str, Path]) -> None:
    model = load_causal_lm(model_dirs["untied"], dtype=torch.float32, device="cpu")
    bias = torch.nn.Linear(32, NUM_TOKENS, bias=True)
    model.set_output_embeddings(bias)
    with pytest.raises(AdapterError, match="do not follow its final norm"):
        scale_logits(model, 0.1)


def test_another_tokenizer_is_refused(model_dirs: dict[str, Path], vocabulary: Vocabulary, tmp_path: Path) -> None:
    shutil.copytree(model_dirs["adapter"], tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    path.write_text(path.read_text().replace('"t5"', '"five"'))
    with pytest.raises(VocabularyError, match="another tokenizer"):
        load_adapter_start(tmp_path / "other", vocabulary, num_bins=2, seed=0, device="cpu")
    path.unlink()
    with pytest.raises(VocabularyError, match="does not exist"):
        load_adapter_start(tmp_path / "other", vocabulary, num_bins=2, seed=0, device="cpu")


def test_what_is_not_a_model_directory_is_refused(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not a directory"):
        load(tmp_path / "none")
    with pytest.raises(AdapterError, match="cannot be loaded"):
        load(tmp_path)
    shutil.copytree(model_dirs["adapter"], tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match="missing weights"):
        load(tmp_path / "short")


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(VocabularyError, match="cannot be loaded"):
        load_vocabulary(tmp_path)


def test_nan_weights_are_never_written(model_dirs: dict[str, Path], vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = load_causal_lm(model_dirs["adapter"], dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 3] = float("nan")
    with pytest.raises(WeightsError, match="NaN"):
        write_version(tmp_path / "store", model, vocabulary, VersionInfo("a", 1.0, (), {}))
    assert list((tmp_path / "store").iterdir()) == []


def test_end_tokens_come_from_the_models_settings(model_dirs: dict[str, Path]) -> None:
    model = load_causal_lm(model_dirs["base"], dtype=torch.float32, device="cpu")
    assert end_token_ids(model) == {0}
    model.generation_config.eos_token_id = [0, 5]
    assert end_token_ids(model) == {0, 5}


def test_encoding_and_decoding_are_the_tokenizers(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("t3 t1") == [3, 1]
    assert vocabulary.decode([3, 0, 1]) == "t3 t1"
    assert (vocabulary.size, vocabulary.num_tokens) == (64, 64)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_dropout_a_model_computes_the_same_in_training(family: str, model_dirs: dict[str, Path]) -> None:
    """GPT-2 drops out in modules, Llama in its attention function, by a number."""
    name, settings = ("gpt2", {}) if family == "gpt2" else ("base", {"attention_dropout": 0.5})
    model = AutoModelForCausalLM.from_pretrained(model_dirs[name], dtype=torch.float32, **settings).train()
    ids = torch.arange(1, 12)[None]
    before = model.config.to_dict()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    turn_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert model.config.to_dict() == before
