"""A LoRA on the adapter LM: trained, resumed, and published as the engine takes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_adapters.contract.errors import AdapterError, InvalidRequestError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_adapters.lora_weights import merge, read_lora
from trimtab_adapters.store import VersionStore
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.models import Vocabulary
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer
from trimtab_training.wiring import build_learner, find_checkpoint

QUARK = {"kind": "quark", "num_bins": 2, "control_token_ids": [60, 61]}
LORA = {"lora": {"r": 4, "lora_alpha": 8.0}}


def test_a_lora_begins_as_its_trunk_and_only_its_matrices_are_trained(
    make_config: Any, vocabulary: Vocabulary, model_dirs: dict[str, Path]
) -> None:
    learner, start = build_learner(make_config(models=LORA, objective=QUARK), vocabulary, None)
    trunk = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(start.model(ids).logits, trunk(ids).logits)
    assert start.control_token_ids == (60, 61)
    assert learner.objective.prefix == (60,)
    names = [name for name, parameter in start.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


def test_a_trained_lora_is_a_version_that_computes_what_was_trained(
    make_config: Any, lucky_scorer: Scorer, model_dirs: dict[str, Path], vocabulary: Vocabulary
) -> None:
    config = make_config(models=LORA, objective=QUARK, optimiser={"lr": 3e-2})
    result = train(config, scorer=lucky_scorer)
    manifest, path = VersionStore(Path(result.path).parent).open(result.version)
    assert manifest.lora is not None
    assert (manifest.lora.r, manifest.reward, manifest.prefix_token_ids) == (4, "lucky@1", [60])
    assert manifest.evaluation["num_prompts"] == result.evaluation["num_prompts"]
    trunk = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32)
    lora, updates = read_lora(path)
    resumed, _ = build_learner(config, vocabulary, find_checkpoint(config, resume=True))
    trained = resumed.policy.adapter.eval()
    ids = torch.tensor([[60, 1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(trunk(ids).logits, original(ids).logits)
        merge(trunk, lora, updates)
        torch.testing.assert_close(trunk(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)
        assert float((trained(ids).logits - original(ids).logits).abs().max()) > 0.1


def test_an_interrupted_lora_run_ends_with_the_same_weights(
    make_config: Any, lucky_scorer: Scorer, tmp_path: Path
) -> None:
    straight = make_config(models=LORA, objective=QUARK, output_dir=str(tmp_path / "straight"))
    expected = read_lora(Path(train(straight, scorer=lucky_scorer).path))[1]
    config = make_config(models=LORA, objective=QUARK)
    interruption = Interruption()

    def report(progress: Any) -> None:
        if progress["step"] == 7:
            interruption.request("released")

    with pytest.raises(TrainingInterrupted):
        train(config, scorer=lucky_scorer, interruption=interruption, report=report)
    got = read_lora(Path(train(config, scorer=lucky_scorer, resume=True).path))[1]
    assert got.keys() == expected.keys()
    for module, update in got.items():
        assert torch.equal(update.down, expected[module].down), module
        assert torch.equal(update.up, expected[module].up), module


def test_a_lora_cannot_have_control_tokens_that_its_trunk_has_not(make_config: Any, vocabulary: Vocabulary) -> None:
    with pytest.raises(AdapterError, match="control_token_ids"):
        build_learner(make_config(models=LORA), vocabulary, None)
    with pytest.raises(AdapterError, match="no token 64"):
        build_learner(make_config(models=LORA, objective={**QUARK, "control_token_ids": [60, 64]}), vocabulary, None)
    with pytest.raises(InvalidRequestError, match="2 different tokens"):
        make_config(objective={**QUARK, "control_token_ids": [60, 60]})


def test_layers_that_the_trunk_has_not_are_refused(make_config: Any, vocabulary: Vocabulary) -> None:
    config = make_config(models={"lora": {"target_modules": ["nowhere"]}}, objective=QUARK)
    with pytest.raises(AdapterError, match=r"models\.lora"):
        build_learner(config, vocabulary, None)


def test_without_a_lora_named_control_tokens_leave_the_embeddings_alone(
    make_config: Any, vocabulary: Vocabulary, lucky_scorer: Scorer
) -> None:
    config = make_config(objective=QUARK, steps=1)
    learner, _ = build_learner(config, vocabulary, None)
    assert learner.policy.adapter.get_input_embeddings().weight.shape[0] == 64
    manifest = read_manifest(Path(train(config, scorer=lucky_scorer).path))
    assert (manifest.prefix_token_ids, manifest.training["control_token_ids"]) == ([60], [60, 61])


def test_a_loras_gradient_is_the_same_with_checkpointing(make_config: Any, vocabulary: Vocabulary) -> None:
    """Its first trained layer stands behind a frozen table, whose output has no gradient of its own."""
    gradients = []
    for checkpointed in (False, True):
        models = {**LORA, "gradient_checkpointing": checkpointed}
        built, _ = build_learner(make_config(models=models, objective=QUARK), vocabulary, None)
        built.policy.adapter.train()
        output = built.policy.forward([(1, 2)], [(3, 4, 5)], [(60,)])
        output.token_logprobs()[0].sum().backward()  # type: ignore[no-untyped-call]
        parameters = [p for p in built.policy.adapter.parameters() if p.requires_grad]
        assert all(parameter.grad is not None for parameter in parameters)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[1], gradients[0])
