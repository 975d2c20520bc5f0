"""Strategies of selection on a real engine, through the official client. The reward is a tiny random classifier."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from gateway_process import RunningGateway
from tiny_models import TinyModels

pytestmark = pytest.mark.engine

PROMPT = "t5 t9 t33 t70 t2"
FIELDS: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def client(gateway: RunningGateway, tiny_models: TinyModels) -> Iterator[OpenAI]:
    spec = {"name": "tiny", "kind": "hf_classifier", "target": str(tiny_models.classifier)}
    with gateway.client() as admin:
        assert admin.post("/admin/rewards", json=spec).status_code == 200
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, *, model: str = "adapter", extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = {"return_token_ids": True, "ignore_eos": True, "reward": "tiny", **(extra or {})}
    return client.completions.create(model=model, **{**FIELDS, **fields}, extra_body=body)


def told(completion: Any) -> dict[str, Any]:
    selection: dict[str, Any] = completion.choices[0].model_extra["selection"]
    return selection


def tokens(choice: Any) -> list[int]:
    return list(choice.model_extra["token_ids"])


@pytest.mark.parametrize("model", ["base", "adapter", "other"])
@pytest.mark.parametrize(
    "selection",
    [
        {"strategy": "blockwise", "block_tokens": 5},
        {"strategy": "early_reject", "checkpoints": [3, 7, 11]},
    ],
)
def test_greedy_pieces_are_the_greedy_answer_token_for_token(
    client: OpenAI, model: str, selection: dict[str, Any]
) -> None:
    """Every continuation of a greedy answer is the greedy answer, so cutting it into pieces must not show."""
    plain = ask(client, model=model, temperature=0, extra={"reward": None})
    extra = {"selection": selection, "calibration": {"size": 0}, "steering_logprobs": True}
    pieces = ask(client, model=model, temperature=0, best_of=3, extra=extra, logprobs=0)
    assert tokens(pieces.choices[0]) == tokens(plain.choices[0])
    assert pieces.choices[0].text == plain.choices[0].text
    record = pieces.choices[0].model_extra["steering_logprobs"]
    assert record["token_ids"] == tokens(plain.choices[0])
    assert record["steered"] == pytest.approx(pieces.choices[0].logprobs.token_logprobs, abs=1e-4)
    assert (max(record["kl"]) > 0) == (model != "base")


def test_a_blockwise_stream_is_the_same_answer_block_by_block(client: OpenAI) -> None:
    extra = {"selection": {"strategy": "blockwise", "block_tokens": 6}, "calibration": {"size": 0}}
    whole = ask(client, best_of=4, extra=extra)
    chunks = list(ask(client, best_of=4, extra=extra, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert len([text for text in texts if text]) == 4
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 4 * 24
    # Better than one sample of each block would be by chance: it is the best of four at every block.
    assert told(whole)["num_blocks"] == 4


def test_a_stop_string_that_lies_in_two_blocks_is_found(client: OpenAI) -> None:
    extra = {"selection": {"strategy": "blockwise", "block_tokens": 6}, "calibration": {"size": 0}}
    plain = ask(client, best_of=2, extra=extra)
    words = plain.choices[0].text.split(" ")
    words = words[1:] if not words[0] else words
    stop = " ".join(words[5:7])  # the last word of the first block and the first of the second
    at = plain.choices[0].text.find(stop)
    stopped = ask(client, best_of=2, extra=extra, stop=[stop])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (plain.choices[0].text[:at], "stop")
    assert tokens(stopped.choices[0]) == tokens(plain.choices[0])[: len(tokens(stopped.choices[0]))]


def test_adaptive_stops_at_the_first_good_candidate(client: OpenAI) -> None:
    everything = ask(client, n=16, extra={"selection": {"return_candidates": True}, "calibration": {"size": 32}})
    values = {c["index"]: c["reward"] for c in everything.model_extra["candidates"]}
    # The calibrator is kept, so the same prompt has the same calibrated rewards again.
    first = next((i for i in range(16) if values[i]["calibrated"] >= 0.75), None)
    assert first is not None, "one in 10^9 would have no candidate above the reference's upper quartile"
    selection = {"strategy": "adaptive", "threshold": 0.75, "wave": 1}
    adaptive = ask(client, best_of=16, extra={"selection": selection, "calibration": {"size": 32}})
    assert told(adaptive)["num_candidates"] == first + 1
    assert told(adaptive)["is_met"]
    assert told(adaptive)["reward"]["raw"] == pytest.approx(values[first]["raw"], abs=1e-5)
    assert adaptive.usage.completion_tokens == 24 * (first + 1)
    waves = ask(client, best_of=16, extra={"selection": {**selection, "wave": 4}, "calibration": {"size": 32}})
    assert told(waves)["num_candidates"] == min(16, 4 * (first // 4 + 1))
    assert told(waves)["reward"]["raw"] >= told(adaptive)["reward"]["raw"] - 1e-5


def test_early_rejection_spends_no_token_on_those_that_are_out(client: OpenAI) -> None:
    selection = {"strategy": "early_reject", "checkpoints": [6, 12], "return_candidates": True}
    data = ask(client, best_of=8, extra={"selection": selection, "calibration": {"size": 0}, "steering_logprobs": True})
    assert told(data)["num_stopped"] == 6
    # Eight to 6 tokens, four to 12, two to 24.
    assert data.usage.completion_tokens == 8 * 6 + 4 * 6 + 2 * 12
    lengths = sorted(len(c["token_ids"]) for c in data.model_extra["candidates"])
    assert lengths == [6, 6, 6, 6, 12, 12, 24, 24]
    assert len(data.choices[0].model_extra["steering_logprobs"]["base"]) == 24


@pytest.mark.parametrize(
    "selection",
    [{"strategy": "soft", "beta": 0.2}, {"strategy": "rejection", "beta": 0.5}, {"strategy": "poisson", "mean": 3.0}],
)
def test_random_choices_repeat_with_their_seed(client: OpenAI, selection: dict[str, Any]) -> None:
    extra = {"selection": selection, "calibration": {"size": 32}}
    first, again = (ask(client, best_of=8, extra=extra) for _ in range(2))
    assert tokens(first.choices[0]) == tokens(again.choices[0])
    others = {tuple(tokens(ask(client, best_of=8, extra=extra, seed=seed).choices[0])) for seed in range(5)}
    assert len(others) > 1


def test_a_buffered_stream_is_the_chosen_answer(client: OpenAI) -> None:
    extra: dict[str, Any] = {"calibration": {"size": 0}}
    whole = ask(client, best_of=5, extra=extra)
    with pytest.raises(BadRequestError, match="buffered"):
        ask(client, best_of=5, extra=extra, stream=True)
    chunks = list(ask(client, best_of=5, extra={**extra, "selection": {"stream": "buffered"}}, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 2


def test_blockwise_works_for_chats(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "adapter",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 20,
        "temperature": 0,
    }
    plain = client.chat.completions.create(**fields, extra_body={"ignore_eos": True})
    selection = {"strategy": "blockwise", "block_tokens": 7}
    body = {"ignore_eos": True, "reward": "tiny", "best_of": 2, "calibration": {"size": 0}, "selection": selection}
    blocks = client.chat.completions.create(**fields, extra_body=body)
    assert blocks.choices[0].message.content == plain.choices[0].message.content
