"""A black-box engine: what it answers, asks, bills and refuses, over a fake provider with real adapter LMs."""

import asyncio
import itertools
from contextlib import aclosing
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from black_box_bench import TOP_K, Bench, MakeBench
from fake_provider import FAST, FakeProvider, bigram_logprobs, refusal, without_logprobs
from steering_reference import Reference
from tiny_models import NUM_TOKENS
from trimtab_adapters.contract.errors import (
    AdapterError,
    EngineError,
    EngineRequestError,
    EngineUnavailableError,
    InvalidRequestError,
    SteeringError,
)
from trimtab_adapters.contract.params import SteeringOperators
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.engine.base import Candidate, EngineRequest
from trimtab_server.engine.black_box import FIRST_KEPT_S

pytestmark = pytest.mark.anyio

WEAK = (("adapter", 0.05),)
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def base_of(last_token: int, num_top: int = TOP_K, *, residual: bool = False) -> Tensor:
    """The base's row as the provider shows it, worked out by hand."""
    logprobs = bigram_logprobs(last_token)
    best = np.argsort(-logprobs)[:num_top]
    row = np.full(NUM_TOKENS, -np.inf)
    if residual:
        row[:] = np.log((1 - np.exp(logprobs[best]).sum()) / (NUM_TOKENS - num_top))
    row[best] = logprobs[best]
    return torch.tensor(row, dtype=torch.float32)


def greedy(
    reference: Reference, prompt: list[int], num_tokens: int, terms: Any, *, residual: bool = False
) -> tuple[list[int], list[float], list[float]]:
    """Tokens, base and steered log-probabilities of the plain loop."""
    tokens, base_logprobs, steered_logprobs = list(prompt), [], []
    for _ in range(num_tokens):
        base = base_of(tokens[-1], residual=residual)
        adapters = sum(alpha * reference.logprobs(name, tokens) for name, alpha in terms)
        steered = torch.log_softmax(base + adapters, dim=-1)
        token = int(steered.argmax())
        base_logprobs.append(float(torch.log_softmax(base, dim=-1)[token]))
        steered_logprobs.append(float(steered[token]))
        tokens.append(token)
    return tokens[len(prompt) :], base_logprobs, steered_logprobs


async def record_of(bench: Bench, candidate: Candidate) -> SteeringRecord:
    assert candidate.steering is not None
    uid = candidate.steering.uid
    return (await bench.engine.take_records([uid]))[uid]


@pytest.mark.parametrize("unseen", ["exclude", "residual"])
@pytest.mark.parametrize("api", ["openai", "vllm"])
@pytest.mark.parametrize("terms", [(("adapter", 1.0),), (("adapter", 2.0), ("other", -0.5))], ids=["one", "two"])
async def test_a_greedy_answer_is_that_of_the_plain_loop(
    make_bench: MakeBench, reference: Reference, unseen: str, api: str, terms: Any
) -> None:
    bench = await make_bench(FakeProvider(api), unseen=unseen)
    candidate = await bench.engine.generate(bench.steered(terms=terms, max_tokens=10, **GREEDY))
    tokens, base, steered = greedy(reference, [3, 4, 5], 10, terms, residual=unseen == "residual")
    record = await record_of(bench, candidate)
    assert candidate.token_ids == record.token_ids == tokens
    assert record.base_logprobs == pytest.approx(base, abs=1e-4)
    assert record.steered_logprobs == candidate.token_logprobs == pytest.approx(steered, abs=1e-4)
    assert candidate.text == "".join(f" t{token}" for token in tokens)
    assert candidate.finish_reason == "length"


async def test_residual_and_exclude_are_not_the_same(make_bench: MakeBench, reference: Reference) -> None:
    """With a strong adapter the residual lets tokens in that are not shown; else the test above shows little."""
    terms = [("adapter", 4.0)]
    answers = [greedy(reference, [3, 4, 5], 10, terms, residual=residual)[0] for residual in (False, True)]
    assert answers[0] != answers[1]
    bench = await make_bench(unseen="residual")
    candidate = await bench.engine.generate(bench.steered(terms=(("adapter", 4.0),), max_tokens=10, **GREEDY))
    assert candidate.token_ids == answers[1]


async def test_every_token_is_a_call_that_sends_the_answer_so_far(make_bench: MakeBench) -> None:
    bench = await make_bench()
    candidate = await bench.engine.generate(bench.steered(max_tokens=4, **GREEDY))
    prompts = [body["prompt"] for body in bench.fake.bodies]
    assert prompts == [[3, 4, 5, *candidate.token_ids[:i]] for i in range(4)]
    assert {body["max_tokens"] for body in bench.fake.bodies} == {1}
    assert {body["temperature"] for body in bench.fake.bodies} == {1.0}
    assert candidate.usage == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "black_box": {
            "calls": 4,
            "prompt_tokens": 3 + 4 + 5 + 6,
            "completion_tokens": 4,
            "cached_tokens": 4,
            "unmapped_tokens": 0,
            "resplit_calls": 0,
            "total_tokens": 22,
        },
    }


async def test_the_provider_learns_nothing_of_the_adapters(make_bench: MakeBench) -> None:
    bench = await make_bench(FakeProvider("vllm"))
    await bench.engine.generate(bench.steered(uid="secret-uid", seed=77, stop=["zzz"]))
    asked = {
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "logprobs",
        "stream",
        "return_tokens_as_token_ids",
    }
    assert set().union(*bench.fake.bodies) == asked


async def test_candidates_of_one_prompt_share_their_first_call(make_bench: MakeBench) -> None:
    now = 0.0
    bench = await make_bench(clock=lambda: now)
    requests = [bench.steered(f"u-{i}", max_tokens=1, seed=i, temperature=2.0, terms=WEAK) for i in range(8)]
    candidates = await asyncio.gather(*map(bench.engine.generate, requests))
    assert len(bench.fake.bodies) == 1
    assert sum(candidate.usage["black_box"]["calls"] for candidate in candidates) == 1
    assert len({candidate.token_ids[0] for candidate in candidates}) > 1
    await bench.engine.generate(bench.steered("soon", max_tokens=1, seed=9))
    assert len(bench.fake.bodies) == 1
    now = FIRST_KEPT_S + 1
    await bench.engine.generate(bench.steered("later", max_tokens=1, seed=9))
    assert len(bench.fake.bodies) == 2, "the base may have changed"


async def test_a_first_call_that_failed_is_made_again(make_bench: MakeBench) -> None:
    bench = await make_bench(FakeProvider(replies=[refusal(400)]))
    with pytest.raises(EngineRequestError):
        await bench.engine.generate(bench.steered("a", max_tokens=1))
    assert len((await bench.engine.generate(bench.steered("b", max_tokens=1))).token_ids) == 1


async def test_the_same_seed_gives_the_same_answer_whoever_is_beside_it(make_bench: MakeBench) -> None:
    bench = await make_bench()
    alone = await bench.engine.generate(bench.steered("a", max_tokens=8, seed=5))
    beside = [bench.steered(f"b-{i}", max_tokens=8, seed=i, prompt=[9 + i, 2]) for i in range(6)]
    again, *_ = await asyncio.gather(*map(bench.engine.generate, [bench.steered("c", max_tokens=8, seed=5), *beside]))
    other = await bench.engine.generate(bench.steered("d", max_tokens=8, seed=6))
    assert alone.token_ids == again.token_ids != other.token_ids


async def test_concurrent_answers_are_steered_in_one_batch(make_bench: MakeBench) -> None:
    """Those that wait together step together: 6 answers of 5 tokens take fewer than 30 steps."""
    bench = await make_bench()
    requests = [bench.steered(f"u-{i}", max_tokens=5, seed=i, ignore_eos=True) for i in range(6)]
    before = await bench.engine.status()
    await asyncio.gather(*map(bench.engine.generate, requests))
    status = await bench.engine.status()
    assert status.steered_rows - before.steered_rows == 30
    assert status.steered_steps - before.steered_steps < 30


@pytest.mark.parametrize("lookahead", [2, 4, 50])
async def test_lookahead_changes_the_calls_and_not_the_answer(make_bench: MakeBench, lookahead: int) -> None:
    one, ahead = await make_bench(), await make_bench(lookahead=lookahead)
    request = one.steered(max_tokens=20, terms=WEAK, **GREEDY)
    expected, found = await one.engine.generate(request), await ahead.engine.generate(request)
    assert found.token_ids == expected.token_ids
    assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-5)
    assert len(ahead.fake.bodies) < len(one.fake.bodies) == 20
    assert {body["temperature"] for body in ahead.fake.bodies if body["max_tokens"] > 1} == {0.0}
    assert max(body["max_tokens"] for body in ahead.fake.bodies) == min(lookahead, 20)


async def test_lookahead_draws_from_the_same_distribution(make_bench: MakeBench) -> None:
    """Seeded draws use one random number a token, so they are the same tokens with and without."""
    one, ahead = await make_bench(), await make_bench(lookahead=5)
    for seed in range(5):
        request = one.steered(max_tokens=12, seed=seed, ignore_eos=True)
        assert (await one.engine.generate(request)).token_ids == (await ahead.engine.generate(request)).token_ids


async def test_an_unsteered_answer_is_one_call(make_bench: MakeBench) -> None:
    bench = await make_bench()
    candidate = await bench.engine.generate(bench.plain(temperature=0, max_tokens=5, stop=["zzz"], top_p=0.9))
    (body,) = bench.fake.bodies
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["stop"]) == (5, 0, 0.9, ["zzz"])
    tokens = [3, 4, 5]
    for _ in range(5):
        tokens.append(int(bigram_logprobs(tokens[-1]).argmax()))
    assert candidate.token_ids == tokens[3:]
    assert candidate.usage["black_box"]["calls"] == 1


@pytest.mark.parametrize(("api", "seeded", "num_calls"), [("openai", 0, 1), ("openai", 1, 3), ("vllm", 1, 1)])
async def test_a_group_of_unsteered_candidates_is_billed_one_prompt(
    make_bench: MakeBench, api: str, seeded: int, num_calls: int
) -> None:
    """vLLM gives choice i the seed + i; of others that is not known."""
    bench = await make_bench(FakeProvider(api))
    requests = [bench.plain(f"u-{i}", **({"seed": i} if seeded else {})) for i in range(3)]
    candidates = await bench.engine.generate_group(requests)
    assert len(candidates) == 3
    assert len(bench.fake.bodies) == num_calls
    assert sum(c.usage["black_box"]["prompt_tokens"] for c in candidates) == 3 * num_calls


async def test_a_field_that_the_api_lacks_is_done_here(make_bench: MakeBench) -> None:
    bench = await make_bench()
    candidate = await bench.engine.generate(bench.plain(top_k=1, max_tokens=3, ignore_eos=True))
    assert len(bench.fake.bodies) == 3
    assert candidate.token_ids[0] == int(bigram_logprobs(5).argmax())


async def test_a_stream_says_what_the_whole_answer_says(make_bench: MakeBench) -> None:
    clock = itertools.count(0.0, 2 * FIRST_KEPT_S)
    bench = await make_bench(clock=lambda: next(clock))
    for request in (bench.steered(**GREEDY), bench.plain(temperature=0)):
        whole = await bench.engine.generate(request)
        text, token_ids, usage = "", [], None
        async with aclosing(bench.engine.stream(request)) as deltas:
            async for delta in deltas:
                text += delta.choice.get("text") or ""
                token_ids += delta.token_ids
                usage = delta.usage or usage
        assert (text, token_ids, usage) == (whole.text, whole.token_ids, whole.usage)


async def test_a_chat_is_rendered_by_the_tokenizers_own_template(make_bench: MakeBench) -> None:
    bench = await make_bench()
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "t3 t4"}]}], "max_tokens": 3}
    request = EngineRequest("chat.completions", body | {"logprobs": True, "top_logprobs": 2} | GREEDY, None, "u")
    chat = EngineRequest("chat.completions", request.body, bench.steered().steering, "u")
    candidate = await bench.engine.generate(chat)
    assert candidate.prompt_token_ids == [3, 4]
    assert candidate.choice["message"] == {"role": "assistant", "content": candidate.text}
    entries = candidate.choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == candidate.token_logprobs
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2, 2]
    assert entries[0]["token"] == entries[0]["top_logprobs"][0]["token"]


@pytest.mark.parametrize("is_steered", [True, False])
async def test_nothing_of_a_chat_comes_before_what_may_still_fail(make_bench: MakeBench, is_steered: bool) -> None:
    bench = await make_bench(FakeProvider(replies=[refusal(400)]))
    body = {"messages": [{"role": "user", "content": "t3"}], "max_tokens": 2, "logprobs": True}
    steering = bench.steered().steering if is_steered else None
    stream = bench.engine.stream(EngineRequest("chat.completions", body, steering, "u"))
    with pytest.raises(EngineRequestError):
        await anext(stream)
    deltas = [delta async for delta in bench.engine.stream(EngineRequest("chat.completions", body, steering, "u"))]
    assert deltas[0].choice["delta"] == {"role": "assistant", "content": ""}
    assert deltas[0].prompt_token_ids == [3]
    assert [delta.prompt_token_ids for delta in deltas[1:]] == [None] * (len(deltas) - 1)


async def test_an_answer_ends_at_the_end_token_and_counts_it(make_bench: MakeBench) -> None:
    bench = await make_bench(unseen="residual")
    candidate = await bench.engine.generate(bench.steered(min_tokens=2, logit_bias={"0": 100.0}))
    assert len(candidate.token_ids) == 3
    assert (candidate.token_ids[-1], candidate.finish_reason) == (0, "stop")
    assert candidate.text == "".join(f" t{token}" for token in candidate.token_ids[:2])
    assert (await record_of(bench, candidate)).token_ids == candidate.token_ids
    assert candidate.usage["completion_tokens"] == 3


async def test_explanations_have_alternatives_before_and_after(make_bench: MakeBench) -> None:
    bench = await make_bench()
    candidate = await bench.engine.generate(bench.steered(num_alternatives=3, max_tokens=2, **GREEDY))
    record = await record_of(bench, candidate)
    assert record.alternatives is not None
    assert [len(at.before) for at in record.alternatives] == [3, 3]
    assert record.alternatives[0].before[0].token_id == int(bigram_logprobs(5).argmax())
    assert record.alternatives[0].after[0].token_id == candidate.token_ids[0]


async def test_operators_act_as_in_the_engine(make_bench: MakeBench) -> None:
    bench = await make_bench()
    operators = SteeringOperators(max_kl=0.01)
    candidate = await bench.engine.generate(
        bench.steered(terms=(("adapter", 3.0),), operators=operators, max_tokens=5, **GREEDY)
    )
    kl = (await record_of(bench, candidate)).kl
    assert max(kl) <= 0.01 + 1e-5
    assert max(kl) > 0.009


async def test_unknown_tokens_are_counted_in_the_answer_and_the_status(make_bench: MakeBench) -> None:
    fake = FakeProvider()
    answer = fake.answer

    def with_stranger(body: dict[str, Any]) -> dict[str, Any]:
        found = answer(body)
        for choice in found["choices"]:
            for top in choice["logprobs"]["top_logprobs"]:
                least = min(top, key=lambda token: top[token] if top[token] > -9 else 0.0)
                top["stranger"] = top.pop(least)
        return found

    fake.answer = with_stranger  # type: ignore[method-assign]
    bench = await make_bench(fake, num_top=TOP_K)
    candidate = await bench.engine.generate(bench.steered(max_tokens=3, **GREEDY))
    status = await bench.engine.status()
    assert status.provider is not None
    assert candidate.usage["black_box"]["unmapped_tokens"] == status.provider.unmapped_tokens == 3


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (refusal(400, "too long"), EngineRequestError),
        (refusal(503), EngineUnavailableError),
        (without_logprobs, EngineError),
    ],
)
async def test_a_failure_in_the_middle_is_an_error_and_never_an_answer(
    make_bench: MakeBench, reply: Any, error: type[Exception]
) -> None:
    bench = await make_bench(FakeProvider(replies=[lambda _: None, *[reply] * 9]))
    with pytest.raises(error):
        await bench.engine.generate(bench.steered(max_tokens=3, **GREEDY))
    status = await bench.engine.status()
    assert [version.active_rows for version in status.versions] == [0, 0]


async def test_a_version_that_is_not_loaded_is_an_error_and_never_an_unsteered_answer(make_bench: MakeBench) -> None:
    bench = await make_bench(is_fresh=True)
    await bench.engine.retire(bench.models.manifest("adapter").version_id)
    with pytest.raises(SteeringError, match="not loaded"):
        await bench.engine.generate(bench.steered())
    assert bench.fake.bodies == []


async def test_an_answer_keeps_its_version_to_its_last_token(make_bench: MakeBench, reference: Reference) -> None:
    bench = await make_bench(is_fresh=True)
    version = bench.models.manifest("adapter").version_id
    token_ids: list[int] = []
    async with aclosing(bench.engine.stream(bench.steered(max_tokens=6, **GREEDY))) as deltas:
        async for delta in deltas:
            token_ids += delta.token_ids
            if len(token_ids) == 2:
                reply = await bench.engine.retire(version)
                assert (reply.freed, reply.active_rows) == (False, 1)
    assert token_ids == greedy(reference, [3, 4, 5], 6, [("adapter", 1.0)])[0]
    await asyncio.sleep(0.05)
    assert version not in [loaded.version for loaded in (await bench.engine.status()).versions]


async def test_a_client_that_leaves_ends_the_work(make_bench: MakeBench) -> None:
    bench = await make_bench()
    task = asyncio.create_task(bench.engine.generate(bench.steered(max_tokens=50, **GREEDY)))
    while len(bench.fake.bodies) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    num_calls = len(bench.fake.bodies)
    await asyncio.sleep(0.05)
    assert len(bench.fake.bodies) <= num_calls + 1
    assert [version.active_rows for version in (await bench.engine.status()).versions] == [0, 0]


async def test_a_refused_version_keeps_the_kind_of_its_error(make_bench: MakeBench, tmp_path: Any) -> None:
    bench = await make_bench(is_fresh=True)
    with pytest.raises(AdapterError, match="manifest"):
        await bench.engine.prepare("0" * 16, str(tmp_path))
    with pytest.raises(EngineRequestError):
        await bench.engine.commit("0" * 16)


async def test_the_adapter_must_reach_to_the_end_of_the_context(make_bench: MakeBench) -> None:
    with pytest.raises(AdapterError, match="positions"):
        await make_bench(max_model_len=4000)


async def test_the_status_tells_what_is_there(make_bench: MakeBench) -> None:
    bench = await make_bench()
    status = await bench.engine.status()
    assert (status.kind, status.model, status.can_guide) == ("black_box", "big-model at provider.test", False)
    assert {version.name: version.state for version in status.versions} == {
        "adapter": "committed",
        "other": "committed",
    }
    bench.fake.models_status = 503
    bench.fake.replies = [refusal(503)] * 9
    with pytest.raises(EngineUnavailableError):
        await bench.engine.generate(bench.plain())
    with pytest.raises(EngineUnavailableError):
        await bench.engine.status()


async def test_a_prompt_may_be_sent_as_text(make_bench: MakeBench) -> None:
    bench = await make_bench(prompt="text")
    candidate = await bench.engine.generate(bench.steered(max_tokens=2, **GREEDY))
    assert [body["prompt"] for body in bench.fake.bodies] == ["t3 t4 t5", f"t3 t4 t5 t{candidate.token_ids[0]}"]


async def test_a_text_that_the_provider_splits_otherwise_is_noticed(make_bench: MakeBench) -> None:
    fake = FakeProvider()

    def split_otherwise(body: dict[str, Any]) -> httpx.Response:
        answer = fake.answer(body)
        answer["usage"]["prompt_tokens"] += 1
        return httpx.Response(200, json=answer)

    fake.replies = [lambda _: None, split_otherwise]
    bench = await make_bench(fake, prompt="text")
    candidate = await bench.engine.generate(bench.steered(max_tokens=3, **GREEDY))
    status = await bench.engine.status()
    assert status.provider is not None
    assert candidate.usage["black_box"]["resplit_calls"] == status.provider.resplit_calls == 1


async def test_texts_and_messages_are_tokenised_here(make_bench: MakeBench) -> None:
    bench = await make_bench()
    assert (await bench.engine.post("/tokenize", {"prompt": "t3 t9"}))["tokens"] == [3, 9]
    messages = [{"role": "user", "content": "t3"}, {"role": "user", "content": "t4"}]
    assert (await bench.engine.post("/tokenize", {"messages": messages}))["tokens"] == [3, 4]
    assert (await bench.engine.post("/detokenize", {"tokens": [3, 9]}))["prompt"] == "t3 t9"
    assert bench.fake.bodies == []
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 3}), ("/detokenize", {"tokens": [3, "4"]})):
        with pytest.raises(InvalidRequestError):
            await bench.engine.post(path, body)
    with pytest.raises(EngineRequestError):
        await bench.engine.post("/v1/embeddings", {})


async def test_retries_are_limited(make_bench: MakeBench) -> None:
    bench = await make_bench(FakeProvider(replies=[refusal(503)] * 99))
    with pytest.raises(EngineUnavailableError):
        await bench.engine.generate(bench.steered())
    assert len(bench.fake.bodies) == FAST.max_retries + 1
