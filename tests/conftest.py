"""Fixtures for all tests: a clean environment and tiny random models that are made once per run."""

import os
from collections.abc import Iterator

import pytest

from tiny_models import TinyModels, make_tiny_models


@pytest.fixture(autouse=True, scope="session")
def clean_environment() -> Iterator[None]:
    """No setting of the developer's machine reaches a test, and nothing asks a hub."""
    saved = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("TRIMTAB_", "VLLM_", "HF_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles its log-probability kernels for 10 s otherwise
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return make_tiny_models(tmp_path_factory.mktemp("tiny-models"))
