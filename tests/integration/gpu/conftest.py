"""One engine under Model Runner V2 for all tests here, in place of the one that the other integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_process import engine
from tiny_models import TinyModels


@pytest.fixture(scope="module")
def engine_url(tiny_models: TinyModels, logs: Path) -> Iterator[str]:
    """As the shared one: chunked prefill by a budget of 64 tokens, preemption by 24 blocks of 32.

    Stopped with its module, because engines share the memory of one GPU.
    """
    arguments = ("--model-runner=v2", "--num-gpu-blocks-override=24", "--gpu-memory-utilization=0.5")
    with engine(tiny_models.base, logs / "engine-v2.log", *arguments) as url:
        yield url
