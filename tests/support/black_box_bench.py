"""A black-box engine with what is behind it, and steppers whose adapters are loaded once."""

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fake_provider import FakeProvider
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.errors import adapter_error
from trimtab_adapters.contract.manifest import vocabulary_fingerprint
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.contract.sampling import UnseenTokens
from trimtab_adapters.in_process.stepper import Session, Stepper
from trimtab_adapters.in_process.tokenizer import BaseTokenizer
from trimtab_adapters.residents import BaseModel
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.black_box import BlackBoxEngine

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
