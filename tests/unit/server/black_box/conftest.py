"""A black-box engine over a fake provider with real adapter LMs."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from black_box_bench import TOP_K, Bench, MakeBench, Steppers
from fake_provider import FAST, FakeProvider
from steering_reference import Reference
from tiny_models import TinyModels
from trimtab_adapters.contract.manifest import vocabulary_fingerprint
from trimtab_adapters.in_process.tokenizer import BaseTokenizer, load_base_tokenizer
from trimtab_server.engine.black_box import BlackBoxEngine, BlackBoxOptions
from trimtab_server.engine.black_box_provider import ProviderLimits


@pytest.fixture(scope="session")
def tokenizer(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    for path in tiny_models.base.glob("tokenizer*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return load_base_tokenizer(str(directory))


@pytest.fixture(scope="session")
def steppers(tiny_models: TinyModels, tokenizer: BaseTokenizer) -> Iterator[Steppers]:
    found = Steppers(tiny_models, tokenizer)
    yield found
    for stepper in found.made.values():
        stepper.aclose()


@pytest.fixture
async def make_bench(anyio_backend: str, steppers: Steppers) -> AsyncIterator[MakeBench]:
    """Makes a bench. `is_fresh` has adapters of its own, for what changes them."""
    async with AsyncExitStack() as stack:

        async def make(
            fake: FakeProvider | None = None,
            limits: ProviderLimits = FAST,
            max_model_len: int = 64,
            clock: Callable[[], float] = time.monotonic,
            is_fresh: bool = False,
            **options: Any,
        ) -> Bench:
            fake = fake or FakeProvider()
            fields: dict[str, Any] = {"api": fake.api, "num_top": TOP_K, "max_model_len": max_model_len} | options
            chosen = BlackBoxOptions(**fields)
            stepper = await steppers.get(chosen.unseen, max_model_len, is_fresh=is_fresh)
            provider, tokenizer = fake.provider(limits), steppers.tokenizer
            fingerprint = vocabulary_fingerprint(tokenizer.vocabulary)
            engine = BlackBoxEngine(provider, stepper, tokenizer, chosen, vocabulary_sha256=fingerprint, clock=clock)
            stack.push_async_callback(engine.aclose if is_fresh else provider.aclose)
            return Bench(engine, fake, steppers.models)

        yield make


@pytest.fixture(scope="session")
def reference(tiny_models: TinyModels) -> Reference:
    """The adapters in plain Hugging Face."""
    models = Reference()
    for name in ("adapter", "other"):
        models.add(name, getattr(tiny_models, name))
    return models
