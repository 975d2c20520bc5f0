from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_training.lora_training import with_lora
from trimtab_training.models_config import LoraConfig
from trimtab_training.objectives.module_weights import load_weights, weights_of
from trimtab_training.objectives.value_model import ValueModel

CONTEXTS = [(5, 6, 7, 8), (9,)]
OUTPUTS = [(1, 2), (3, 4, 5, 6, 7)]


@pytest.fixture(params=["adapter", "gpt2"])
def adapter(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dirs[request.param], dtype=torch.float32)


def with_random_head(adapter: Any) -> ValueModel:
    model = ValueModel(adapter)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(model.head.bias, 0.5)
    return model


def test_every_value_is_0_at_first(adapter: Any) -> None:
    assert ValueModel(adapter).values(CONTEXTS, OUTPUTS).tolist() == [[0.0] * 5] * 2


def test_a_value_is_read_where_its_token_is_predicted(adapter: Any) -> None:
    """Against the adapter's own hidden states of each sequence alone: token t is predicted at position
    len(context) - 1 + t. Tolerance: float32, padding moves the sums."""
    model = with_random_head(adapter)
    values = model.values(CONTEXTS, OUTPUTS)
    for row, (context, output) in enumerate(zip(CONTEXTS, OUTPUTS, strict=True)):
        hidden = adapter.base_model(torch.tensor([[*context, *output]])).last_hidden_state[0]
        expected = hidden[len(context) - 1 : -1] @ model.head.weight[0] + 0.5
        torch.testing.assert_close(values[row, : len(output)], expected, rtol=1e-4, atol=1e-4)


def test_its_trunk_is_a_copy_and_reads_without_dropout(adapter: Any) -> None:
    adapter.train()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    model = with_random_head(adapter)
    assert torch.equal(model.values(CONTEXTS, OUTPUTS), model.values(CONTEXTS, OUTPUTS))
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model.values(CONTEXTS, OUTPUTS).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert any(bool(parameter.grad.any()) for parameter in model.trunk.parameters() if parameter.grad is not None)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_its_weights_come_back_bit_for_bit_and_others_are_refused(adapter: Any) -> None:
    model, fresh = with_random_head(adapter), ValueModel(adapter)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(1.5)
    tensors = weights_of(model, "value.")
    load_weights(fresh, {**tensors, "other.weight": torch.ones(3)}, "value.")
    assert torch.equal(fresh.values(CONTEXTS, OUTPUTS), model.values(CONTEXTS, OUTPUTS))
    with pytest.raises(ValueError, match=r"value\."):
        load_weights(fresh, {name: tensor for name, tensor in tensors.items() if "head.bias" not in name}, "value.")
    with pytest.raises(ValueError, match=r"value\."):
        load_weights(fresh, {**tensors, "value.head.bias": torch.zeros(2)}, "value.")


def test_of_a_lora_the_copys_own_matrices_are_trained(model_dirs: dict[str, Path]) -> None:
    adapter = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32)
    lora = with_lora(adapter, LoraConfig(r=2, dropout=0.5), seed=0)
    model = with_random_head(lora)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith("head.") or ".lora_" in name for name in names)
    assert sum(".lora_" in name for name in names) == sum(p.requires_grad for p in lora.parameters())
    lora.train()
    first = model.train().values(CONTEXTS, OUTPUTS)
    first.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(model.values(CONTEXTS, OUTPUTS), first)
    assert all(parameter.grad is None for parameter in lora.parameters())
