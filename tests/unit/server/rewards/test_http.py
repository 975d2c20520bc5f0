"""Rewards from servers: what is asked, what is made of the answers, and what goes wrong."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from scripted_server import Scripted, ScriptedServer, scripted_server
from trimtab_adapters.contract.errors import (
    InvalidRequestError,
    RewardChangedError,
    RewardError,
    RewardUnavailableError,
)
from trimtab_adapters.contract.rewards import AsyncRewardModel, RewardInput, RewardSpec
from trimtab_server.rewards import http
from trimtab_server.rewards.endpoint import MAX_ANSWER_BYTES, build_reward_client
from trimtab_server.rewards.http import HttpReward

pytestmark = pytest.mark.anyio

SECRET = "my password is hunter2"
INPUTS = [RewardInput("p1 ", "one"), RewardInput("p2 ", "two")]


class VllmServer:
    """Answers as vLLM 0.32 does, for a classifier of three classes whose probabilities are fixed by the text."""

    def __init__(self) -> None:
        self.cards: list[dict[str, Any]] = [
            {"id": "judge", "root": "/models/a", "parent": None, "max_model_len": 512, "created": 1}
        ]
        self.version = "0.32.0"
        self.override: Any = None
        self.labels = ["bad", "plain", "good"]

    def __call__(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            self.cards = [
                card | {"created": card["created"] + 1} for card in self.cards
            ]  # vLLM gives the time of asking
            return {"object": "list", "data": self.cards}
        if path == "/version":
            return {"version": self.version}
        if self.override is not None:
            return self.override
        if path == "/classify":
            return {"data": [self.classified(i, text) for i, text in enumerate(body["input"])]}
        if path == "/score":
            pairs = zip(body["text_1"], body["text_2"], strict=True)
            return {"data": [{"index": i, "score": 0.25 if a == "p1 " else 0.75} for i, (a, _) in enumerate(pairs)]}
        return Scripted(404)

    def classified(self, index: int, text: str) -> dict[str, Any]:
        values = [0.5, 0.2, 0.3] if "one" in text else [0.1, 0.2, 0.7]
        return {"index": index, "label": self.labels[values.index(max(values))], "probs": values, "num_classes": 3}


class JsonServer:
    """Answers the JSON contract: the length of the output."""

    def __init__(self) -> None:
        self.version: Any = "1"
        self.override: Any = None

    def __call__(self, path: str, body: Any) -> Any:
        if self.override is not None:
            return self.override
        return {"rewards": [len(item["output"]) for item in body["inputs"]], "version": self.version}


@pytest.fixture
def vllm() -> VllmServer:
    return VllmServer()


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with build_reward_client() as client:
        yield client


@pytest.fixture
async def vllm_server(vllm: VllmServer) -> AsyncIterator[ScriptedServer]:
    async with scripted_server(vllm) as server:
        yield server


@pytest.fixture
async def json_server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server(JsonServer()) as server:
        yield server


def load(url: str, client: httpx.AsyncClient, environment: dict[str, str] | None = None, **options: Any) -> Any:
    spec = RewardSpec(name="judge", kind="http", target=url, options=options)
    return HttpReward.load(spec, client, environment or {})


async def test_classify_gives_the_class_that_is_wanted(client: httpx.AsyncClient, vllm_server: ScriptedServer) -> None:
    names = ["bad", "plain", "good"]
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [0.3, 0.7]),
        ({"label": 0}, [0.5, 0.1]),
        ({"label": "plain", "labels": names}, [0.2, 0.2]),
        ({"labels": names}, [0.3, 0.7]),
    ]
    for options, expected in cases:
        reward = await load(vllm_server.url, client, api="classify", **options)
        assert isinstance(reward, AsyncRewardModel)
        assert await reward.score(INPUTS) == expected
    path, body, _ = vllm_server.requests[-1]
    assert (path, body) == ("/classify", {"model": "judge", "use_activation": True, "input": ["one", "two"]})


async def test_what_classify_reads_and_gives_are_options(
    client: httpx.AsyncClient, vllm_server: ScriptedServer
) -> None:
    reward = await load(
        vllm_server.url, client, api="classify", template="prompt_output", function="logit", truncate_prompt_tokens=-1
    )
    await reward.score(INPUTS)
    assert vllm_server.requests[-1][1] == {
        "model": "judge",
        "use_activation": False,
        "truncate_prompt_tokens": -1,
        "truncation_side": "left",
        "input": ["p1 one", "p2 two"],
    }


async def test_score_sends_prompts_and_outputs_as_pairs(client: httpx.AsyncClient, vllm_server: ScriptedServer) -> None:
    reward = await load(vllm_server.url + "/", client, api="score")
    assert await reward.score(INPUTS) == [0.25, 0.75]
    path, body, _ = vllm_server.requests[-1]
    assert path == "/score"
    assert (body["text_1"], body["text_2"]) == (["p1 ", "p2 "], ["one", "two"])


async def test_the_json_contract(client: httpx.AsyncClient, json_server: ScriptedServer) -> None:
    reward = await load(json_server.url + "/reward", client, api="json")
    assert await reward.score([*INPUTS, RewardInput("", "lone \ud83d")]) == [3.0, 3.0, 6.0]
    path, body, _ = json_server.requests[-1]
    assert path == "/reward"
    assert body["inputs"][0] == {"prompt": "p1 ", "output": "one"}


async def test_a_key_comes_from_the_environment_and_is_sent_to_the_server_alone(
    client: httpx.AsyncClient, json_server: ScriptedServer
) -> None:
    await load(json_server.url, client, {"TRIMTAB_REWARD_KEY": "k1"}, api="json", api_key_env="TRIMTAB_REWARD_KEY")
    assert json_server.requests[-1][2]["authorization"] == "Bearer k1"
    await load(json_server.url, client, {"TRIMTAB_REWARD_KEY": "k1"}, api="json")
    assert "authorization" not in json_server.requests[-1][2]


async def test_proxies_of_the_environment_are_not_used(
    json_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with build_reward_client() as client:
        await load(json_server.url, client, api="json")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({}, "options.api"),
        ({"api": "grpc"}, "options.api"),
        ({"api": "json", "label": 1}, "options"),
        ({"api": "score", "template": "prompt_output"}, "options"),
        ({"api": "json", "model": "m"}, "options"),
        ({"api": "classify", "label": "good"}, "options"),
        ({"api": "classify", "label": 1.5}, "options.label"),
        ({"api": "classify", "label": True}, "options.label"),
        ({"api": "classify", "label": 3, "labels": ["a", "b", "c"]}, "options"),
        ({"api": "classify", "label": -1}, "options"),
        ({"api": "classify", "labels": ["a", "a"]}, "options"),
        ({"api": "json", "api_key_env": "TRIMTAB_ADMIN_KEYS"}, "options.api_key_env"),
        ({"api": "json", "api_key_env": "TRIMTAB_REWARD_MISSING"}, "options.api_key_env"),
        ({"api": "json", "timeout_s": 0}, "options.timeout_s"),
        ({"api": "json", "timeout_s": "5"}, "options.timeout_s"),
        ({"api": "json", "max_retries": 1.5}, "options.max_retries"),
        ({"api": "json", "max_batch_size": 0}, "options.max_batch_size"),
        ({"api": "json", "headers": {}}, "options.headers"),
    ],
)
async def test_a_bad_option_is_refused_by_its_name(
    client: httpx.AsyncClient, json_server: ScriptedServer, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await load(json_server.url, client, {"TRIMTAB_ADMIN_KEYS": "secret"}, **options)
    assert caught.value.param == param
    assert json_server.requests == []


@pytest.mark.parametrize(
    "target",
    ["", "localhost:80", "ftp://host/x", "http://", "http://user:pw@host/", "http://host/?key=1", "http://[::1"],
)
async def test_a_target_that_is_no_plain_address_is_refused(client: httpx.AsyncClient, target: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await load(target, client, api="json")
    assert caught.value.param == "target"


async def test_the_version_covers_the_options_and_what_the_server_serves(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer
) -> None:
    async def version(**options: Any) -> str:
        return str((await load(vllm_server.url, client, api="classify", **options)).version)

    first = await version()
    assert await version() == first  # `created` alone changes nothing.
    assert await version(timeout_s=5.0, max_batch_size=3, cache_size=0, max_retries=0) == first
    others = [await version(label=0), await version(function="logit"), await version(revision="2")]
    vllm.cards[0]["root"] = "/models/b"
    others.append(await version())
    vllm.version = "0.33.0"
    others.append(await version())
    assert len({first, *others}) == 6


async def test_one_of_several_models_must_be_named(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer
) -> None:
    vllm.cards.append(vllm.cards[0] | {"id": "other"})
    with pytest.raises(RewardError, match=r"has the models judge, other; name one of them in options\.model"):
        await load(vllm_server.url, client, api="classify")
    with pytest.raises(RewardError, match="no model 'third'"):
        await load(vllm_server.url, client, api="classify", model="third")
    await load(vllm_server.url, client, api="classify", model="other")
    assert vllm_server.requests[-1][1]["model"] == "other"


async def test_another_model_behind_the_address_is_seen_and_nothing_is_scored_with_it_under_the_old_version(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer
) -> None:
    now = time.monotonic()
    reward = await load(vllm_server.url, client, api="classify")
    reward._clock = lambda: now
    before = reward.version
    await reward.score(INPUTS)
    vllm.cards[0]["root"] = "/models/b"
    num_looks = vllm_server.paths.count("/v1/models")
    await reward.score(INPUTS)
    assert vllm_server.paths.count("/v1/models") == num_looks  # looked a moment ago
    now += http.IDENTITY_TTL_S + 1
    with pytest.raises(RewardChangedError, match=before):
        await reward.score(INPUTS)
    assert reward.version != before
    assert await reward.score(INPUTS) == [0.3, 0.7]


async def test_an_answer_that_was_under_way_when_another_model_was_seen_is_not_taken(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer
) -> None:
    reward = await load(vllm_server.url, client, api="classify")
    await reward.score(INPUTS)
    answer = {"data": [vllm.classified(i, item.output) for i, item in enumerate(INPUTS)]}
    vllm.override = Scripted(body=json.dumps(answer).encode(), pause_s=0.2)
    under_way = asyncio.create_task(reward.score(INPUTS))
    await asyncio.sleep(0.05)
    vllm.cards[0]["root"] = "/models/b"
    reward._checked_at = None
    with pytest.raises(RewardChangedError):
        await reward.score(INPUTS)
    with pytest.raises(RewardChangedError):
        await under_way


async def test_after_a_failure_the_server_is_asked_again_who_it_is(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer
) -> None:
    reward = await load(vllm_server.url, client, api="classify")
    await reward.score(INPUTS)
    vllm.override = Scripted(503)
    with pytest.raises(RewardUnavailableError):
        await reward.score(INPUTS)
    vllm.override = None
    vllm.cards[0]["root"] = "/models/b"
    with pytest.raises(RewardChangedError):
        await reward.score(INPUTS)


async def test_a_new_version_of_a_json_server_ends_the_call_and_holds_from_then_on(
    client: httpx.AsyncClient, json_server: ScriptedServer
) -> None:
    reward = await load(json_server.url, client, api="json")
    before = reward.version
    json_server.answer.version = "2"  # type: ignore[attr-defined]
    with pytest.raises(RewardChangedError, match=before):
        await reward.score(INPUTS)
    assert reward.version != before
    assert await reward.score(INPUTS) == [3.0, 3.0]


def answers(rewards: Any, version: Any = "1") -> dict[str, Any]:
    return {"rewards": rewards, "version": version}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answers([1.0]), "returned 1 scores for 2 outputs"),
        (answers([1.0, 2.0, 3.0]), "returned 3 scores for 2 outputs"),
        (answers([1.0, "2.0"]), "returned str instead of a number for output 2 of 2"),
        (answers([1.0, None]), "returned NoneType instead of a number for output 2 of 2"),
        (answers([1.0, True]), "returned true instead of a number for output 2 of 2"),
        (answers([1.0, [2.0]]), "returned list instead of a number"),
        (answers([float("nan"), 1.0]), "returned nan for output 1 of 2"),
        (answers([float("inf"), 1.0]), "returned inf for output 1 of 2"),
        (answers("12"), "an array `rewards`"),
        (answers([1.0, 2.0], None), "`version`"),
        (answers([1.0, 2.0], 7), "`version`"),
        (answers([1.0, 2.0], ""), "`version`"),
        ([1.0, 2.0], "an array `rewards`"),
        (Scripted(body=b'{"rewards": [1.0,'), "did not answer JSON"),
        (Scripted(body=b"[" * 100_000), "did not answer JSON"),
        (Scripted(body=b"\xff\xfe\xff"), "did not answer JSON"),
        (Scripted(body=b"x" * (MAX_ANSWER_BYTES + 1)), "answers without end"),
        (Scripted(headers={"Content-Encoding": "gzip"}, body=b"no gzip"), "did not answer JSON"),
        (Scripted(500, SECRET.encode()), "answered 500"),
        (Scripted(400, SECRET.encode()), "answered 400"),
        (Scripted(204, b""), "answered 204"),
        (Scripted(307, headers={"Location": "/elsewhere"}), "redirects are not followed"),
    ],
)
async def test_a_wrong_answer_is_an_error_that_asking_again_does_not_mend(
    client: httpx.AsyncClient, json_server: ScriptedServer, answer: Any, message: str
) -> None:
    reward = await load(json_server.url, client, api="json")
    json_server.answer.override = answer  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=message) as caught:
        await reward.score(INPUTS)
    assert type(caught.value) is RewardError
    assert SECRET not in caught.value.message
    assert "127.0.0.1" not in caught.value.message


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Scripted(429), "answered 429"),
        (Scripted(502), "answered 502"),
        (Scripted(503), "answered 503"),
        (Scripted(body=b'{"rewards": [1.0, 2.0], "version": "1"}', is_cut=True), "broke its answer off"),
    ],
)
async def test_what_may_pass_is_told_apart(
    client: httpx.AsyncClient, json_server: ScriptedServer, answer: Scripted, message: str
) -> None:
    reward = await load(json_server.url, client, api="json")
    json_server.answer.override = answer  # type: ignore[attr-defined]
    with pytest.raises(RewardUnavailableError, match=message):
        await reward.score(INPUTS)


async def test_no_server_at_all_may_pass(client: httpx.AsyncClient) -> None:
    async with scripted_server(JsonServer()) as server:
        reward = await load(server.url, client, api="json")
    with pytest.raises(RewardUnavailableError, match="'judge' cannot be reached") as caught:
        await reward.score(INPUTS)
    assert server.url not in caught.value.message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True), 60.0),
        (lambda: format_datetime(datetime.now(UTC) - timedelta(seconds=60), usegmt=True), 0.0),
        ("soon", None),
        ("-3", None),
    ],
)
async def test_the_pause_that_the_server_asks_for_is_read(
    client: httpx.AsyncClient, json_server: ScriptedServer, header: str | Callable[[], str], seconds: float | None
) -> None:
    reward = await load(json_server.url, client, api="json")
    text = header if isinstance(header, str) else header()
    json_server.answer.override = Scripted(503, headers={"Retry-After": text})  # type: ignore[attr-defined]
    with pytest.raises(RewardUnavailableError) as caught:
        await reward.score(INPUTS)
    assert caught.value.retry_after_s == (None if seconds is None else pytest.approx(seconds, abs=3.0))


def data(*items: Any) -> dict[str, Any]:
    return {"data": list(items)}


ONE = {"index": 0, "label": "good", "probs": [0.1, 0.2, 0.7]}
TWO = {"index": 1, "label": "bad", "probs": [0.5, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (data(ONE), "returned 1 scores for 2 outputs"),
        (data(ONE, ONE), "did not number its scores from 0 to 1"),
        (data(ONE, {**TWO, "index": True}), "did not number its scores"),
        (data(ONE, {**TWO, "index": "1"}), "did not number its scores"),
        (data(ONE, {**TWO, "probs": []}), "no class values"),
        (data(ONE, {**TWO, "probs": [0.5, 0.5]}), "has 2 classes instead of 3"),
        (data(ONE, {**TWO, "probs": [0.5, 0.2, "0.3"]}), "returned str instead of a number"),
        (data(ONE, {**TWO, "probs": [0.5, 0.2, float("nan")]}), "returned nan"),
        (data(ONE, {**TWO, "probs": [2.5, 0.2, 1.3]}), "1.3, which is no probability, for output 2 of 2"),
        (data(ONE, {**TWO, "label": "good"}), "calls its classes otherwise"),
        ({"data": {"0": ONE}}, "an array `data`"),
        ([ONE, TWO], "an array `data`"),
        (data(ONE, 3.0), "an array `data`"),
    ],
)
async def test_a_wrong_answer_of_classify_is_an_error(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer, answer: Any, message: str
) -> None:
    reward = await load(vllm_server.url, client, api="classify", labels=["bad", "plain", "good"])
    vllm.override = answer
    with pytest.raises(RewardError, match=message):
        await reward.score(INPUTS)


async def test_the_order_of_the_answers_is_that_of_their_numbers(
    client: httpx.AsyncClient, vllm_server: ScriptedServer, vllm: VllmServer
) -> None:
    reward = await load(vllm_server.url, client, api="classify")
    vllm.override = data(TWO, ONE)
    assert await reward.score(INPUTS) == [0.7, 0.3]


async def test_a_server_that_lists_no_models_as_vllm_does_is_refused(
    client: httpx.AsyncClient, json_server: ScriptedServer
) -> None:
    json_server.answer = lambda path, body: json.loads('{"data": [{"name": "x"}]}')
    with pytest.raises(RewardError, match="does not list its models"):
        await load(json_server.url, client, api="score")
