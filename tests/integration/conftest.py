"""Real vLLM engines on tiny random models. One engine serves all tests that need nothing special of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_process import engine
from gateway_process import RunningGateway, running_gateway
from tiny_models import TinyModels


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def engine_url(tiny_models: TinyModels, logs: Path) -> Iterator[str]:
    """Chunked prefill by a budget of 64 tokens, and 24 blocks of 32 tokens, so that concurrency forces preemption."""
    template = logs / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    arguments = ("--num-gpu-blocks-override=24", f"--chat-template={template}")
    with engine(tiny_models.base, logs / "engine.log", *arguments) as url:
        yield url


@pytest.fixture(scope="session")
def gateway(
    engine_url: str, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    """A gateway process before the shared engine, with a route for each tiny adapter."""
    with running_gateway(
        tmp_path_factory.mktemp("gateway"),
        *("--engine-url", engine_url),
        *("--adapter", f"adapter={tiny_models.adapter}", "--adapter", f"other={tiny_models.other}"),
    ) as started:
        yield started
