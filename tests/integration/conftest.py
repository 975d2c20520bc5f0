"""Real vLLM engines on tiny random models. One engine serves all tests that need nothing special of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_process import engine
from tiny_models import TinyModels


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def engine_url(tiny_models: TinyModels, logs: Path) -> Iterator[str]:
    """Chunked prefill by a budget of 64 tokens, and 24 blocks of 32 tokens, so that concurrency forces preemption."""
    with engine(tiny_models.base, logs / "engine.log", "--num-gpu-blocks-override=24") as url:
        yield url
