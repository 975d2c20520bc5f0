"""Guidance, operators and explanations on the real engine, against formulas written down a second time in float64."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_client import EngineClient, Terms, TwoModelReference, gather, random_prompts, with_engine
from tiny_models import TinyModels

pytestmark = pytest.mark.engine

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
NEGATIVE = [7, 90, 14, 14, 3, 61, 5, 8, 8, 120, 33, 2, 2, 41, 17, 19, 23, 29, 31, 37]


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> TwoModelReference:
    return TwoModelReference(tiny_models)


def ask(url: str, models: TinyModels, prompts: Sequence[list[int]], terms: Terms, more: dict[str, Any]) -> list[Any]:
    async def work(engine: EngineClient) -> list[dict[str, Any]]:
        return await gather([engine.complete(p, terms, more, max_tokens=40, temperature=0) for p in prompts])

    choices: list[Any] = with_engine(url, models, work)
    return choices


def check(choice: dict[str, Any], base: Tensor, steered: Tensor) -> None:
    """Greedy tokens, and the log-probabilities of record and answer; both tables `[len(output), V]` in float64."""
    tokens, record = choice["token_ids"], choice["record"]
    steered = torch.log_softmax(steered, dim=-1)
    assert tokens == steered.argmax(dim=-1).tolist() == record["token_ids"]
    column = torch.tensor(tokens)[:, None]
    for name, table in (("base_logprobs", base), ("steered_logprobs", steered)):
        torch.testing.assert_close(torch.tensor(record[name]).double(), table.gather(1, column)[:, 0], **CLOSE)
    moved = torch.where(torch.isneginf(steered), 0.0, steered - base)
    torch.testing.assert_close(torch.tensor(record["kl"]).double(), (steered.exp() * moved).sum(dim=-1), **CLOSE)
    assert record["flipped"] == (base.argmax(dim=-1) != steered.argmax(dim=-1)).tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(record["steered_logprobs"], abs=1e-6)


@pytest.mark.parametrize("terms", [[], [("other", 0.7)]], ids=["alone", "with an adapter"])
def test_guidance_moves_away_from_the_base_under_the_negative_prompt(
    engine_url: str, tiny_models: TinyModels, reference: TwoModelReference, terms: Terms
) -> None:
    prompts = random_prompts(11, 24)
    more = {"guidance": {"token_ids": NEGATIVE, "scale": 1.8}}
    for prompt, choice in zip(prompts, ask(engine_url, tiny_models, prompts, terms, more), strict=True):
        output = choice["token_ids"]
        base, _, adapters = reference.run(prompt, terms, output)
        negative = reference.logprobs("base", NEGATIVE, output)[:-1].double()
        base = base[:-1].double()
        steered = base + 0.8 * (base - negative)
        for (_, alpha), logprobs in zip(terms, adapters, strict=True):
            steered = steered + alpha * logprobs[:-1].double()
        check(choice, base, steered)
        at_token = negative.gather(1, torch.tensor(output)[:, None])[:, 0]
        recorded = torch.tensor(choice["record"]["negative_logprobs"]).double()
        torch.testing.assert_close(recorded, at_token, **CLOSE)


@pytest.mark.parametrize(
    "operators",
    [
        {"schedule": {"start": 3, "first": 9, "decay": 0.8}},
        {"plausibility": 0.2},
        {"max_kl": 0.05},
        {"schedule": {"decay": 0.9}, "plausibility": 0.05, "max_kl": 0.3},
    ],
    ids=["schedule", "plausibility", "max_kl", "all"],
)
def test_operators_act_on_what_two_adapters_add(
    engine_url: str, tiny_models: TinyModels, reference: TwoModelReference, operators: dict[str, Any]
) -> None:
    prompts, terms = random_prompts(12, 16), [("adapter", 1.0), ("other", -0.5)]
    for prompt, choice in zip(
        prompts, ask(engine_url, tiny_models, prompts, terms, {"operators": operators}), strict=True
    ):
        output = choice["token_ids"]
        base, _, adapters = reference.run(prompt, terms, output)
        base = base[:-1].double()
        added = sum(alpha * logprobs[:-1].double() for (_, alpha), logprobs in zip(terms, adapters, strict=True))
        assert isinstance(added, Tensor)
        rows = [operated(base[number], added[number], number, operators) for number in range(len(output))]
        steered = torch.stack(rows)
        if "max_kl" not in operators:
            check(choice, base, steered)
        else:  # the engine stops within a thousandth below the cap, so only the path is exact
            check_on_path(choice, base, steered, operators["max_kl"])
        factors = [factor(number, operators) for number in range(len(output))]
        for recorded in choice["record"]["adapter_logprobs"]:
            assert [value is None for value in recorded] == [value == 0.0 for value in factors]


def factor(number: int, operators: dict[str, Any]) -> float:
    schedule = operators.get("schedule") or {}
    past = number - schedule.get("start", 0)
    acts = 0 <= past < schedule.get("first", math.inf)
    return float(schedule.get("decay", 1.0) ** past) if acts else 0.0


def operated(base: Tensor, added: Tensor, number: int, operators: dict[str, Any]) -> Tensor:
    """Steered logits `[V]` of one token; the cap on KL by a hundred bisections."""
    added = factor(number, operators) * added
    if factor(number, operators) == 0.0:
        return base
    if (fraction := operators.get("plausibility")) is not None:
        base = base.masked_fill(base.exp() < fraction * base.exp().max(), -math.inf)
    if (cap := operators.get("max_kl")) is None or kl(base + added, base) <= cap:
        return base + added
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(base + middle * added, base) <= cap else (low, middle)
    return base + low * added


def kl(steered: Tensor, base: Tensor) -> float:
    steered, base = torch.log_softmax(steered, dim=-1), torch.log_softmax(base, dim=-1)
    return float((steered.exp() * torch.where(torch.isneginf(steered), 0.0, steered - base)).sum())


def check_on_path(choice: dict[str, Any], base: Tensor, steered: Tensor, cap: float) -> None:
    """Values within what a thousandth of the cap can move a log-probability; KL never above the cap."""
    tokens, record = torch.tensor(choice["token_ids"])[:, None], choice["record"]
    steered = torch.log_softmax(steered, dim=-1)
    recorded = torch.tensor(record["steered_logprobs"]).double()
    torch.testing.assert_close(recorded, steered.gather(1, tokens)[:, 0], atol=1e-2, rtol=0.0)
    margin = steered.max(dim=-1).values - steered.gather(1, tokens)[:, 0]
    assert float(margin.max()) < 1e-2, "a token was taken that is not the most probable one"
    assert record["token_ids"] == choice["token_ids"]
    if torch.isneginf(steered).any():
        return  # the record's KL is to the whole base, the cap is on the plausible tokens
    assert max(record["kl"]) <= cap * (1 + 1e-3)
    assert max(record["kl"]) > 0.98 * cap, "the cap never bound, so that the test shows nothing"


def test_an_explanation_lists_what_was_probable_before_and_after(
    engine_url: str, tiny_models: TinyModels, reference: TwoModelReference
) -> None:
    prompts, terms = random_prompts(13, 6), [("adapter", 1.0)]
    for prompt, choice in zip(
        prompts, ask(engine_url, tiny_models, prompts, terms, {"num_alternatives": 4}), strict=True
    ):
        base, steered, _ = reference.run(prompt, terms, choice["token_ids"])
        for number, place in enumerate(choice["record"]["alternatives"]):
            for table, side in ((base[number], place["before"]), (steered[number], place["after"])):
                assert [entry["token_id"] for entry in side] == table.topk(4).indices.tolist()
                for entry in side:
                    assert entry["base"] == pytest.approx(float(base[number, entry["token_id"]]), abs=1e-4)
                    assert entry["steered"] == pytest.approx(float(steered[number, entry["token_id"]]), abs=1e-4)


def test_an_unsteered_row_is_explained_as_the_base(engine_url: str, tiny_models: TinyModels) -> None:
    (choice,) = ask(engine_url, tiny_models, [[5, 6, 7]], [], {"num_alternatives": 2})
    record = choice["record"]
    assert record["base_logprobs"] == record["steered_logprobs"]
    assert set(record["kl"]) == {0.0}
    assert all(place["before"] == place["after"] for place in record["alternatives"])
