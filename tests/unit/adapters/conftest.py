import pytest
import torch

from steering_reference import Reference, base_description
from tiny_models import TinyModels
from trimtab_adapters.residents import Residents


@pytest.fixture(scope="session")
def reference(tiny_models: TinyModels) -> Reference:
    loops = Reference()
    loops.add("adapter", tiny_models.adapter)
    loops.add("other", tiny_models.other)
    return loops


@pytest.fixture
def residents(tiny_models: TinyModels) -> Residents:
    return Residents(base_description(tiny_models.base), torch.device("cpu"), kv_bytes=1 << 24, dtype=torch.float32)
