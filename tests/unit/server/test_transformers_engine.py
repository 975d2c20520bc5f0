"""An engine whose encoder-decoder base runs beside the adapter LMs: real tiny models, no gateway."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from steering_reference import Reference
from tiny_blenderbot import blenderbot_logprobs, tiny_blenderbot, write_blenderbot
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.errors import (
    AdapterError,
    EngineError,
    EngineRequestError,
    InvalidRequestError,
    SteeringError,
)
from trimtab_adapters.contract.manifest import vocabulary_fingerprint
from trimtab_adapters.contract.params import AdapterWeight, SteeringParams
from trimtab_adapters.in_process.stepper import BaseModel, Session, Stepper
from trimtab_adapters.in_process.tokenizer import load_base_tokenizer
from trimtab_adapters.in_process.transformers_base import TransformersBase
from trimtab_server.engine.base import EngineRequest
from trimtab_server.engine.transformers_engine import TransformersEngine
from trimtab_server.settings import Settings

pytestmark = pytest.mark.anyio

PROMPT = [3, 4, 5]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@dataclass
class Bench:
    engine: TransformersEngine[Session]
    base: TransformersBase
    model: Any
    models: TinyModels
    adapters: Reference

    def request(
        self, *, alpha: float = 0.0, endpoint: Any = "completions", num_begun: int = 0, **body: Any
    ) -> EngineRequest:
        uid = uuid.uuid4().hex
        body = {"prompt": PROMPT, "max_tokens": 8, "logprobs": 0, "return_token_ids": True} | body
        steering = None
        if alpha:
            version = self.models.manifest("adapter").version_id
            weights = [AdapterWeight(name="adapter", version=version, alpha=alpha)]
            steering = SteeringParams(uid=uid, adapters=weights, record=True)
        return EngineRequest(endpoint, body, steering, uid, num_begun)

    def logprobs(self, output: Sequence[int], alpha: float, prompt: Sequence[int] = PROMPT) -> Tensor:
        """Steered next-token log-probabilities, `[len(output) + 1, V]`: plain models, one pass of each."""
        base = blenderbot_logprobs(self.model, prompt, output)
        if not alpha:
            return base
        read = [self.adapters.logprobs("adapter", [*prompt, *output[:at]]) for at in range(len(output) + 1)]
        return torch.log_softmax(base + alpha * torch.stack(read), dim=-1)


@pytest.fixture
async def bench(anyio_backend: str, tiny_models: TinyModels, tmp_path: Path) -> AsyncIterator[Bench]:
    write_blenderbot(tmp_path, seed=5)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    tokenizer = load_base_tokenizer(str(tmp_path))
    model = tiny_blenderbot(seed=5)
    base = TransformersBase(model, NUM_TOKENS)
    fingerprint = vocabulary_fingerprint(tokenizer.vocabulary)
    described = BaseModel(NUM_TOKENS, NUM_TOKENS, fingerprint, base.limits.total)
    engine = TransformersEngine(
        Stepper(described, lm=base, kv_bytes=16 << 20),
        tokenizer,
        model=str(tmp_path),
        limits=base.limits,
        has_encoder=True,
        vocabulary_sha256=fingerprint,
    )
    version = tiny_models.manifest("adapter").version_id
    await engine.prepare(version, str(tiny_models.adapter))
    await engine.commit(version)
    adapters = Reference()
    adapters.add("adapter", tiny_models.adapter)
    yield Bench(engine, base, model, tiny_models, adapters)
    await engine.aclose()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
async def test_a_greedy_answer_is_that_of_the_plain_models(bench: Bench, alpha: float) -> None:
    candidate = await bench.engine.generate(bench.request(alpha=alpha, max_tokens=12, **GREEDY))
    expected = bench.logprobs(candidate.token_ids, alpha)[:-1]
    assert candidate.token_ids == expected.argmax(dim=-1).tolist()
    assert candidate.token_logprobs == pytest.approx(expected.max(dim=-1).values.tolist(), abs=1e-4)
    assert candidate.finish_reason == "length"
    assert candidate.usage == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    if alpha:
        assert candidate.steering is not None
        record = (await bench.engine.take_records([candidate.steering.uid]))[candidate.steering.uid]
        base = bench.logprobs(candidate.token_ids, 0.0)[:-1]
        chosen = base.gather(1, torch.tensor(candidate.token_ids)[:, None])[:, 0]
        assert record.token_ids == candidate.token_ids
        assert record.base_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
        kl = (expected.exp() * (expected - base)).sum(dim=-1)
        assert record.kl == pytest.approx(kl.tolist(), abs=1e-4)
        assert any(record.flipped), "steering that changes nothing shows nothing"


async def test_candidates_at_once_do_not_mix(bench: Bench) -> None:
    prompts = [[7, 8, 9, 10], [11], [12, 13], PROMPT]
    requests = [bench.request(alpha=1.0, prompt=prompt, max_tokens=5 + i, **GREEDY) for i, prompt in enumerate(prompts)]
    for prompt, candidate in zip(prompts, await bench.engine.generate_group(requests), strict=True):
        expected = bench.logprobs(candidate.token_ids, 1.0, prompt)[:-1]
        assert candidate.token_ids == expected.argmax(dim=-1).tolist()


async def test_sampled_tokens_follow_the_formula(bench: Bench) -> None:
    """2,000 first tokens, chi-square over all that are expected five times; a false alarm once in 10,000 runs."""
    steered = bench.logprobs([], 1.0)[0].double().softmax(dim=-1)
    requests = [bench.request(alpha=1.0, max_tokens=1, seed=seed, ignore_eos=True) for seed in range(2000)]
    drawn = [candidate.token_ids[0] for candidate in await bench.engine.generate_group(requests)]
    counts = torch.bincount(torch.tensor(drawn), minlength=NUM_TOKENS).double()
    expected = steered * len(drawn)
    large = expected >= 5
    seen = [*counts[large].tolist(), float(counts[~large].sum())]
    wanted = [*expected[large].tolist(), float(expected[~large].sum())]
    assert stats.chisquare(seen, wanted).pvalue > 1e-4
    again = await bench.engine.generate(bench.request(alpha=1.0, max_tokens=1, seed=17, ignore_eos=True))
    assert again.token_ids[0] == drawn[17]


async def test_an_answer_in_pieces_is_the_answer_at_once(bench: Bench) -> None:
    """The encoder must not read what was answered so far."""
    whole = await bench.engine.generate(bench.request(alpha=1.0, max_tokens=9, **GREEDY))
    tokens: list[int] = []
    for _ in range(3):
        body = {"prompt": [*PROMPT, *tokens], "max_tokens": 3, **GREEDY}
        tokens += (await bench.engine.generate(bench.request(alpha=1.0, num_begun=len(tokens), **body))).token_ids
    assert tokens == whole.token_ids


async def test_a_stream_that_is_closed_lets_go_of_its_row(bench: Bench) -> None:
    async with aclosing(bench.engine.stream(bench.request(alpha=1.0, max_tokens=40, **GREEDY))) as deltas:
        async for delta in deltas:
            assert delta.prompt_token_ids == PROMPT
            break
    async with asyncio.timeout(10):
        while any(version.active_rows for version in (await bench.engine.status()).versions):
            await asyncio.sleep(0.005)


async def test_the_status_tells_what_adapters_and_answers_must_fit(bench: Bench) -> None:
    status = await bench.engine.status()
    assert (status.kind, status.max_model_len, status.max_output_len) == ("transformers", 96, 48)
    assert status.vllm_version == ""
    assert (await bench.engine.post("/tokenize", {"prompt": "t3 t4"}))["tokens"] == [3, 4]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [([3] * 49, 1, "48 of them for the prompt"), ([3], 49, "maximum context length is 96"), ([3] * 48, 49, "96")],
)
async def test_what_does_not_fit_is_refused(bench: Bench, prompt: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(EngineRequestError, match=message):
        await bench.engine.generate(bench.request(prompt=prompt, max_tokens=max_tokens))


async def test_the_longest_prompt_and_answer_fit(bench: Bench) -> None:
    candidate = await bench.engine.generate(bench.request(prompt=[3] * 48, max_tokens=48, **GREEDY))
    assert len(candidate.token_ids) == 48


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        ("completions", {"repetition_penalty": 1.2}, "repetition_penalty"),
        ("completions", {"prompt_logprobs": 1}, "prompt_logprobs"),
        (
            "chat.completions",
            {"messages": [{"role": "assistant", "content": "t3"}], "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
async def test_what_it_cannot_do_is_refused_and_not_ignored(
    bench: Bench, endpoint: Any, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError, match="a base that runs in transformers") as caught:
        await bench.engine.generate(bench.request(endpoint=endpoint, **body))
    assert caught.value.param == param


async def test_a_base_that_fails_fails_its_request_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.base.next_logits

    def broken(row: Any, token_ids: Sequence[int]) -> Tensor:
        if token_ids[0] == 99:
            raise RuntimeError("out of memory")
        return real(row, token_ids)

    monkeypatch.setattr(bench.base, "next_logits", broken)
    good, bad = await asyncio.gather(
        bench.engine.generate(bench.request(alpha=1.0, **GREEDY)),
        bench.engine.generate(bench.request(alpha=1.0, prompt=[99, 3], **GREEDY)),
        return_exceptions=True,
    )
    assert isinstance(bad, EngineError)
    assert not isinstance(good, BaseException)
    assert len(good.token_ids) == 8


async def test_steering_that_fails_is_never_an_answer(bench: Bench) -> None:
    request = bench.request(alpha=1.0, **GREEDY)
    assert request.steering is not None
    await bench.engine.retire(request.steering.adapters[0].version)
    with pytest.raises(SteeringError):
        await bench.engine.generate(request)


async def test_an_adapter_that_does_not_fit_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        await bench.engine.prepare("0" * 16, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "needs model"),
        ({"engine_urls": ("http://host",)}, "no use for engine_urls"),
        ({"engine_args": ("--x",)}, "no use for engine_urls and engine_args"),
        ({"engine_kind": "tensorrt"}, "'vllm' or 'transformers'"),
        ({"transformers_context": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {"engine_kind": "transformers", "model": "/models/blenderbot"}
    assert Settings(**whole).base_model == "/models/blenderbot"
    with pytest.raises(ValueError, match=message):
        Settings(**(whole | changes))
