"""A black-box engine over a fake provider with real adapter LMs."""

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fake_provider import FAST, FakeProvider
from steering_reference import Reference
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.black_box.stepper import Session, Stepper
from trimtab_adapters.black_box.tokenizer import BaseTokenizer, load_base_tokenizer
from trimtab_adapters.contract.black_box import UnseenTokens
from trimtab_adapters.contract.errors import adapter_error
from trimtab_adapters.contract.manifest import vocabulary_fingerprint
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.residents import BaseModel
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.black_box import BlackBoxEngine, BlackBoxOptions
from trimtab_server.engine.black_box_provider import ProviderLimits

TOP_K = 6


@dataclass
class Bench:
    """An engine with `adapter` and `other` committed, and what is behind it."""

    engine: BlackBoxEngine[Session]
    fake: FakeProvider
    models: TinyModels

    def steered(
        self, uid: str | None = None, *, terms: tuple[tuple[str, float], ...] = (("adapter", 1.0),), **body: Any
    ) -> EngineRequest:
        """A request for a steered completion of a few ids."""
        uid = uid or uuid.uuid4().hex
        weights = [AdapterWeight(name=n, version=self.models.manifest(n).version_id, alpha=a) for n, a in terms]
        more = {name: body.pop(name) for name in ("operators", "num_alternatives") if name in body}
        steering = SteeringParams(uid=uid, adapters=weights, record=True, **more)
        return EngineRequest("completions", self.body(**body), steering, uid)

    def plain(self, uid: str = "u-0", **body: Any) -> EngineRequest:
        return EngineRequest("completions", self.body(**body), None, uid)

    @staticmethod
    def body(**changes: Any) -> dict[str, Any]:
        return {"prompt": [3, 4, 5], "max_tokens": 6, "logprobs": 0, "return_token_ids": True} | changes


MakeBench = Callable[..., Awaitable[Bench]]


@pytest.fixture(scope="session")
def tokenizer(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    for path in tiny_models.base.glob("tokenizer*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return load_base_tokenizer(str(directory))


@dataclass
class Steppers:
    """Steppers with both adapters committed, each made once, because loading takes its time."""

    models: TinyModels
    tokenizer: BaseTokenizer
    made: dict[tuple[UnseenTokens, int], Stepper] = field(default_factory=dict)

    async def get(self, unseen: UnseenTokens, max_model_len: int, *, is_fresh: bool) -> Stepper:
        key = (unseen, max_model_len)
        if key in self.made and not is_fresh:
            return self.made[key]
        fingerprint = vocabulary_fingerprint(self.tokenizer.vocabulary)
        base = BaseModel(NUM_TOKENS, NUM_TOKENS, fingerprint, max_model_len)
        stepper = Stepper(base, unseen=unseen, kv_bytes=16 << 20)
        for name in ("adapter", "other"):
            version = self.models.manifest(name).version_id
            state = await stepper.prepare(version, str(getattr(self.models, name)))
            if state.error is not None:
                raise adapter_error(state.error, state.error_code)
            await stepper.commit(version)
        if not is_fresh:
            self.made[key] = stepper
        return stepper


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
            chosen = BlackBoxOptions(**({"api": fake.api, "num_top": TOP_K, "max_model_len": max_model_len} | options))
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
