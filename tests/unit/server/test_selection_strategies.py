"""Strategies that stop candidates or draw more of them: who is chosen, who is stopped, what is counted."""

import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from fake_gateway import FakeGateway, asgi_client, build_gateway
from selecting import STOPS, Known, SteppingEngine, all_candidates, answer, chosen_text, states
from trimtab_adapters.infalign.estimated_threshold import estimated_threshold_for_win_rate
from trimtab_server.engine import fake_model

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"max_tokens": 14, "stop": STOPS}
SEEDS = range(12)


@pytest.fixture
async def gateway(anyio_backend: str) -> FakeGateway:
    """References score 0.05, 0.15 ... 0.95, so a reward r in [0, 1] is calibrated to itself, cut to tenths."""
    gateway = build_gateway(fake=SteppingEngine())
    gateway.scoring.fixed = [(i + 0.5) / 10 for i in range(10)]
    return gateway


@pytest.fixture
async def client(gateway: FakeGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(gateway.app) as client:
        yield client


def pseudo_reward(prompt: str, output: str) -> float:
    """A number in [0, 1) that depends on every letter and on nothing else."""
    return math.fmod(sum((i + 1) * ord(letter) for i, letter in enumerate(output)) * 0.6180339887, 1.0)


def calibrated(reward: float) -> float:
    return sum((i + 0.5) / 10 <= reward for i in range(10)) / 10


def best(candidates: list[Known]) -> Known:
    """By calibrated, then raw reward, then number; the fake's mean log-probabilities never have to decide."""

    def key(candidate: Known) -> tuple[float, float, int]:
        raw = pseudo_reward("", candidate.text)
        return calibrated(raw), raw, -candidate.index

    return max(candidates, key=key)


def scores(candidates: list[Known]) -> list[float]:
    return [calibrated(pseudo_reward("", candidate.text)) for candidate in candidates]


@pytest.mark.parametrize("seed", SEEDS)
async def test_adaptive_draws_one_by_one_until_a_candidate_is_good_enough(
    client: httpx.AsyncClient, gateway: FakeGateway, seed: int
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    known = await all_candidates(client, 16, seed=seed, **BODY)
    passing = [i for i, score in enumerate(scores(known)) if score >= 0.7]
    drawn = known[: passing[0] + 1] if passing else known
    selection = {"strategy": "adaptive", "threshold": 0.7, "wave": 1}
    data = await answer(client, seed=seed, reward="pseudo", selection=selection, **BODY)
    assert chosen_text(data) == best(drawn).text
    told = data["choices"][0]["selection"]
    assert (told["num_candidates"], told["is_met"], told["threshold"]) == (len(drawn), bool(passing), 0.7)
    assert data["usage"]["completion_tokens"] == sum(candidate.length for candidate in drawn)


def by_waves(known: list[Known], threshold: float, wave: int, cap: int) -> tuple[list[Known], list[Known]]:
    """The rule, written down again: complete candidates, and those of a decided wave that are longer."""
    complete: list[Known] = []
    late: list[Known] = []
    for start in range(0, cap, wave):
        members = known[start : min(start + wave, cap)]
        lengths = [c.length for c in members if calibrated(pseudo_reward("", c.text)) >= threshold]
        limit = min(lengths, default=math.inf)
        complete += [c for c in members if c.length <= limit]
        late += [c for c in members if c.length > limit]
        if lengths:
            break
    return complete, late


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_wave_ends_with_the_shortest_good_candidate_and_stops_the_longer_ones(
    client: httpx.AsyncClient, gateway: FakeGateway, seed: int
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    known = await all_candidates(client, 12, seed=seed, **BODY)
    complete, late = by_waves(known, 0.7, 4, 12)
    selection = {"strategy": "adaptive", "threshold": 0.7, "wave": 4, "return_candidates": True}
    data = await answer(client, seed=seed, best_of=12, reward="pseudo", selection=selection, **BODY)
    assert chosen_text(data) == best(complete).text
    told = states(data)
    assert sorted(told) == sorted(c.index for c in complete + late)
    assert {i for i, state in told.items() if state in ("stopped", "late")} == {c.index for c in late}
    assert told[best(complete).index] == "chosen"
    # What was generated of the stopped is counted, and shown.
    by_index = {candidate["index"]: candidate for candidate in data["candidates"]}
    for candidate in late:
        shown = by_index[candidate.index]
        if shown["state"] == "stopped":
            assert shown["finish_reason"] == "abort"
            assert candidate.text.startswith(shown["text"])
            assert shown["reward"] is None


@pytest.mark.parametrize("seed", SEEDS)
async def test_how_fast_candidates_grow_changes_nothing_of_the_answer(
    client: httpx.AsyncClient, gateway: FakeGateway, seed: int
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    engine = gateway.engine
    assert isinstance(engine, SteppingEngine)
    texts = []
    for slow in (frozenset[int](), frozenset({0, 2}), frozenset({1, 3})):
        engine.slow, engine.pause = slow, 40
        data = []
        for selection in (
            {"strategy": "adaptive", "threshold": 0.8, "wave": 4},
            {"strategy": "early_reject", "checkpoints": [3, 6]},
            {"strategy": "rejection", "beta": 0.3, "wave": 2},
        ):
            told = await answer(client, seed=seed, best_of=8, reward="pseudo", selection=selection, **BODY)
            data.append(chosen_text(told))
        texts.append(data)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("slow", [frozenset[int](), frozenset({1, 3})])
async def test_candidates_that_are_too_long_are_stopped_and_not_awaited(
    client: httpx.AsyncClient, gateway: FakeGateway, slow: frozenset[int]
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    engine = gateway.engine
    assert isinstance(engine, SteppingEngine)
    engine.slow, engine.pause = slow, 3
    body: dict[str, Any] = {"max_tokens": 60, "stop": [" river"]}
    selection = {"strategy": "adaptive", "threshold": 0.5, "wave": 4, "return_candidates": True}
    num_long = 0
    for seed in SEEDS:
        known = await all_candidates(client, 4, seed=seed, **body)
        complete, late = by_waves(known, 0.5, 4, 4)
        data = await answer(client, seed=seed, best_of=4, reward="pseudo", selection=selection, **body)
        limit = max(c.length for c in complete)
        if slow & {c.index for c in complete if c.length == limit}:
            continue  # the others have run ahead of the one that decides
        # The decision takes a few turns of the event loop, in which candidates grow by a token each.
        long = [c for c in late if c.length > limit + 12]
        shown = {c["index"]: c for c in data["candidates"]}
        num_long += len(long)
        for candidate in long:
            assert shown[candidate.index]["state"] == "stopped"
        assert data["usage"]["completion_tokens"] <= sum(min(c.length, limit + 12) for c in known)
    assert num_long > 5  # else there was nothing to see
    assert len(engine.observed.aborted) >= num_long


async def test_a_price_and_a_target_become_thresholds(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward

    async def threshold(size: int, **goal: float) -> float:
        selection = {"strategy": "adaptive", "wave": 1, **goal}
        body = {**BODY, "calibration": {"size": size}}
        data = await answer(client, seed=1, best_of=20, reward="pseudo", selection=selection, **body)
        value: float = data["choices"][0]["selection"]["threshold"]
        return value

    # Of exact values 1 - sqrt(2 price), and 2 target - 1 but for the cap: 0.7^20 is below 10^-3. A thousand rollouts
    # are as good to within one of them in a thousand, and the error of the order statistic.
    assert await threshold(1024, price=0.02) == pytest.approx(1 - math.sqrt(0.04), abs=4e-3)
    assert await threshold(1024, target=0.85) == pytest.approx(0.7, abs=4e-3)
    # Few rollouts make up for their error by a higher threshold.
    assert await threshold(16, target=0.85) == estimated_threshold_for_win_rate(0.85, 20, 1, 16) > 0.7


async def test_adaptive_goes_on_until_there_are_as_many_good_candidates_as_choices(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    known = await all_candidates(client, 16, seed=3, **BODY)
    selection = {"strategy": "adaptive", "threshold": 0.6, "wave": 1}
    data = await answer(client, seed=3, n=2, reward="pseudo", selection=selection, **BODY)
    # The first wave has as many as there are choices, then one at a time.
    num = next(k for k in range(2, 17) if sum(score >= 0.6 for score in scores(known[:k])) >= 2)
    assert [choice["text"] for choice in data["choices"]] == [
        c.text for c in sorted(known[:num], key=lambda c: -pseudo_reward("", c.text))[:2]
    ]
    assert data["choices"][0]["selection"]["num_candidates"] == num


class Grown:
    """A candidate that is generated in pieces over the fake model; it ends at a stop word."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.text = ""
        self.has_ended = False

    def grow(self, piece: int, num_candidates: int, seed: int, until: int) -> None:
        prompt, seeded = [72, 105, *self.tokens], seed + piece * num_candidates + self.index
        for position in range(until - len(self.tokens)):
            if self.has_ended:
                return
            token = fake_model.next_token(prompt, position, (), seed=seeded, greedy=False)
            self.tokens.append(token.id)
            self.has_ended = token.text in STOPS
            self.text += "" if self.has_ended else token.text


def by_checkpoints(seed: int, num: int, checkpoints: list[int], max_tokens: int) -> tuple[list[Grown], list[Grown]]:
    """The rule, written down again: those that came to their end, and those that were stopped."""
    everyone = rivals = [Grown(index) for index in range(num)]
    for piece, checkpoint in enumerate([*checkpoints, max_tokens]):
        for candidate in rivals:
            candidate.grow(piece, num, seed, checkpoint)
        if checkpoint == max_tokens or all(candidate.has_ended for candidate in rivals):
            continue
        order = sorted(rivals, key=lambda c: (-pseudo_reward("", c.text), c.index))
        rivals = sorted(order[: round(0.5 * len(rivals))], key=lambda c: c.index)
    ended = [c for c in everyone if c.has_ended or len(c.tokens) == max_tokens]
    return ended, [c for c in everyone if c not in ended]


@pytest.mark.parametrize("seed", SEEDS)
async def test_early_rejection_keeps_the_better_half_at_each_checkpoint(
    client: httpx.AsyncClient, gateway: FakeGateway, seed: int
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    ended, stopped = by_checkpoints(seed, 8, [3, 6], 14)
    selection = {"strategy": "early_reject", "checkpoints": [3, 6], "return_candidates": True}
    data = await answer(client, seed=seed, best_of=8, reward="pseudo", selection=selection, **BODY)
    told = states(data)
    assert {i for i, state in told.items() if state == "stopped"} == {c.index for c in stopped}
    winner = max(ended, key=lambda c: (calibrated(pseudo_reward("", c.text)), pseudo_reward("", c.text), -c.index))
    assert (chosen_text(data), told[winner.index]) == (winner.text, "chosen")
    assert data["choices"][0]["selection"]["num_stopped"] == len(stopped)
    # Nothing is generated beyond a checkpoint that is not wanted.
    assert data["usage"]["completion_tokens"] == sum(len(c.tokens) for c in ended + stopped)
    shown = {c["index"]: c for c in data["candidates"]}
    for candidate in stopped:
        assert (shown[candidate.index]["text"], shown[candidate.index]["finish_reason"]) == (candidate.text, "abort")


async def test_another_reward_may_judge_unfinished_texts(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    judged: list[str] = []

    def prefix_reward(prompt: str, output: str) -> float:
        judged.append(output)
        return -float(len(output))

    gateway.scoring.rewards |= {"pseudo": pseudo_reward, "prefix": prefix_reward}
    known = await all_candidates(client, 4, seed=5, max_tokens=4)
    selection = {"strategy": "early_reject", "checkpoints": [4], "prefix_reward": "prefix", "return_candidates": True}
    data = await answer(client, seed=5, best_of=4, reward="pseudo", selection=selection, max_tokens=10)
    assert sorted(judged) == sorted(c.text for c in known)
    shortest = sorted(known, key=lambda c: (len(c.text), c.index))[:2]
    assert {i for i, state in states(data).items() if state in ("chosen", "not_chosen")} == {c.index for c in shortest}


async def test_without_checkpoints_candidates_are_judged_once_at_three_sixteenths(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    data = await answer(
        client, best_of=4, reward="pseudo", selection={"strategy": "early_reject"}, max_tokens=20, seed=1
    )
    assert data["choices"][0]["selection"]["checkpoints"] == [3]


async def test_soft_draws_in_proportion_to_the_tilt(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    beta, num, rounds = 0.25, 3, 400
    seen = expected = variance = 0.0
    for seed in range(rounds):
        known = await all_candidates(client, num, seed=seed, max_tokens=4)
        weights = [math.exp(score / beta) for score in scores(known)]
        data = await answer(
            client, seed=seed, best_of=num, reward="pseudo", max_tokens=4, selection={"strategy": "soft", "beta": beta}
        )
        seen += chosen_text(data) == known[0].text
        share = weights[0] / sum(weights)
        expected += share
        variance += share * (1 - share)
    # Seeds are fixed, so this cannot flicker; a wrong rule would have missed by chance once in ten thousand times.
    assert abs(seen - expected) < 3.9 * math.sqrt(variance)


async def test_a_sharp_soft_choice_is_the_best_and_a_flat_one_is_not(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward

    async def share_of_best(beta: float) -> float:
        hits = 0
        for seed in range(60):
            known = await all_candidates(client, 4, seed=seed, max_tokens=4)
            selection = {"strategy": "soft", "beta": beta}
            data = await answer(client, seed=seed, best_of=4, reward="pseudo", max_tokens=4, selection=selection)
            top = max(scores(known))
            hits += calibrated(pseudo_reward("", chosen_text(data))) == top
        return hits / 60

    assert await share_of_best(0.002) == 1.0
    assert await share_of_best(50.0) < 0.7


async def test_rejection_accepts_by_the_tilt_and_says_whether_it_was_exact(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    exact = await answer(
        client, seed=2, reward="pseudo", selection={"strategy": "rejection", "beta": 0.5, "wave": 1}, max_tokens=4
    )
    told = exact["choices"][0]["selection"]
    assert told["is_exact"]
    assert told["num_accepted"] == 1
    assert told["num_candidates"] <= 16
    # exp((C - 1) / 0.001) is below 10^-43 for every C below 1, and no candidate of these has C = 1.
    gateway.scoring.rewards["low"] = lambda prompt, output: 0.5
    never = await answer(
        client,
        seed=2,
        best_of=5,
        reward="low",
        selection={"strategy": "rejection", "beta": 0.001, "return_candidates": True},
        max_tokens=4,
    )
    told = never["choices"][0]["selection"]
    assert (told["is_exact"], told["num_accepted"], told["num_candidates"]) == (False, 0, 5)
    assert sorted(states(never).values()) == ["chosen", *["not_chosen"] * 4]


async def test_poisson_draws_a_random_number_and_takes_the_best(
    client: httpx.AsyncClient, gateway: FakeGateway
) -> None:
    gateway.scoring.rewards["pseudo"] = pseudo_reward
    numbers = []
    for seed in range(200):
        data = await answer(
            client,
            seed=seed,
            best_of=20,
            reward="pseudo",
            selection={"strategy": "poisson", "mean": 3.0},
            max_tokens=3,
        )
        numbers.append(data["choices"][0]["selection"]["num_candidates"])
        known = await all_candidates(client, numbers[-1], seed=seed, max_tokens=3)
        assert chosen_text(data) == best(known).text
    # 1 + Poisson(3): mean 4, variance 3. Fixed seeds; a wrong mean would pass by chance once in ten thousand times.
    assert abs(sum(numbers) / 200 - 4) < 3.9 * math.sqrt(3 / 200)
    variance = sum((k - 4) ** 2 for k in numbers) / 200
    assert 1.8 < variance < 4.5
