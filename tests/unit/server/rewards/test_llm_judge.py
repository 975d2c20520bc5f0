"""Rewards from a language model that rates."""

import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from scripted_server import ScriptedServer, scripted_server
from trimtab_adapters.contract.errors import InvalidRequestError, RewardChangedError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.endpoint import build_reward_client
from trimtab_server.rewards.judge_answers import (
    JudgeText,
    expected_rating,
    read_chat,
    read_completion,
    written_rating,
)
from trimtab_server.rewards.llm_judge import JudgeReward

pytestmark = pytest.mark.anyio


class Judge:
    """Answers in OpenAI's form with the given tokens, and the ratings' probabilities at each of them."""

    def __init__(self, *tokens: str, ratings: dict[str, float] | None = None) -> None:
        self.tokens = tokens or ("4",)
        self.ratings = ratings or {"4": 0.75, "5": 0.25}
        self.model: Any = "judge-2026"

    def __call__(self, path: str, body: Any) -> Any:
        text = "".join(self.tokens)
        logprobs = {token: math.log(p) for token, p in self.ratings.items()}
        if path == "/v1/chat/completions":
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "logprobs": None}
            if body.get("logprobs"):
                top = [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]
                content = [{"token": token, "logprob": -0.1, "top_logprobs": top} for token in self.tokens]
                choice["logprobs"] = {"content": content}
        else:
            assert path == "/v1/completions"
            choice = {"text": text, "logprobs": None}
            if body.get("logprobs"):
                choice["logprobs"] = {"tokens": list(self.tokens), "top_logprobs": [logprobs for _ in self.tokens]}
        return {"model": self.model, "choices": [choice]}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with build_reward_client() as client:
        yield client


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server(Judge()) as server:
        yield server


def load(url: str, client: httpx.AsyncClient, **options: Any) -> Any:
    options = {"model": "judge"} | options
    return JudgeReward.load(RewardSpec(name="taste", kind="llm_judge", target=url, options=options), client, {})


INPUT = RewardInput("Say {output}!", "I say {prompt}.")


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_the_rating_is_the_mean_under_the_judges_probabilities_or_what_it_writes(
    client: httpx.AsyncClient, server: ScriptedServer, api: str
) -> None:
    reward = await load(server.url + "/v1", client, api=api)
    # 0.75 * 4 + 0.25 * 5
    assert await reward.score([INPUT, INPUT]) == pytest.approx([4.25, 4.25])
    reward = await load(server.url + "/v1", client, api=api, method="text")
    assert await reward.score([INPUT]) == [4.0]


async def test_the_judge_is_asked_once_per_output_with_the_template_filled_in_one_pass(
    client: httpx.AsyncClient, server: ScriptedServer
) -> None:
    template = "{lowest}-{highest}: {prompt} / {output} / {other}"
    reward = await load(server.url + "/v1", client, template=template, system="Be strict.", highest=9)
    server.requests.clear()
    await reward.score([INPUT])
    ((path, body, _),) = server.requests
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "judge",
        "max_tokens": 8,
        "temperature": 0.0,
        "messages": [
            {"role": "system", "content": "Be strict."},
            {"role": "user", "content": "1-9: Say {output}! / I say {prompt}. / {other}"},
        ],
        "logprobs": True,
        "top_logprobs": 5,
    }


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"template": "no place"}, "options.template"),
        ({"lowest": 5}, "options"),
        ({"highest": 10}, "options"),
        ({"api": "completions", "system": "x"}, "options"),
        ({"model": ""}, "options.model"),
        ({"max_batch_size": 2}, "options.max_batch_size"),
        ({"top_logprobs": 21}, "options.top_logprobs"),
    ],
)
async def test_a_bad_option_is_refused_by_its_name(
    client: httpx.AsyncClient, server: ScriptedServer, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await load(server.url + "/v1", client, **options)
    assert (caught.value.param, server.requests) == (param, [])


async def test_a_judge_without_probabilities_is_refused_for_expected_ratings(client: httpx.AsyncClient) -> None:
    answer = {"choices": [{"message": {"content": "4"}, "logprobs": None}]}
    async with scripted_server(lambda path, body: answer) as server:
        with pytest.raises(RewardError, match="gave no log-probabilities"):
            await load(server.url, client)
        assert await (await load(server.url, client, method="text")).score([INPUT]) == [4.0]


async def test_another_model_under_the_same_name_is_another_version(
    client: httpx.AsyncClient, server: ScriptedServer
) -> None:
    reward = await load(server.url + "/v1", client)
    before = reward.version
    server.answer.model = "judge-2027"  # type: ignore[attr-defined]
    with pytest.raises(RewardChangedError, match=before):
        await reward.score([INPUT])
    assert reward.version != before
    await reward.score([INPUT])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", 4.0), (" 4\n", 4.0), ("Rating: 4 of 5", 4.0), ("4.5", 4.5), ("**3**", 3.0)],
)
def test_the_first_number_is_the_rating(text: str, expected: float) -> None:
    assert written_rating("r", JudgeText(text), 1, 5) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gave no number"),
        ("excellent", "gave no number"),
        ("five", "gave no number"),
        ("0", "rated outside of 1 to 5"),
        ("10", "rated outside of 1 to 5"),
        ("-3", "rated outside of 1 to 5"),
        ("5.5", "rated outside of 1 to 5"),
    ],
)
def test_text_without_a_rating_is_an_error(text: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        written_rating("r", JudgeText(text), 1, 5)


def judged(*tokens: str, top: dict[str, float]) -> JudgeText:
    entries = [(token, math.log(p)) for token, p in top.items()]
    none = [("x", 0.0)]
    return JudgeText("".join(tokens), tokens, [entries if t.strip().isdigit() else none for t in tokens])


def test_probabilities_of_other_tokens_do_not_count_and_forms_of_a_digit_are_one_rating() -> None:
    # Ratings: 2 with 0.1 + 0.2, 4 with 0.3, of 0.6 in all; "7", "44" and "good" are none.
    top = {"2": 0.1, " 2": 0.2, "4": 0.3, "7": 0.1, "44": 0.1, "good": 0.2}
    expected = (2 * 0.3 + 4 * 0.3) / 0.6
    assert expected_rating("r", judged("Rating", ":", " 2", top=top), 1, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (judged("4", ".", "5", top={"4": 1.0}), "did not write its rating as one token"),
        (judged("x4", top={"4": 1.0}), "did not write its rating as one token"),
        (judged("4", top={"good": 1.0}), "gave no probability to any rating"),
        (judged("good", top={"4": 1.0}), "gave no number"),
        (JudgeText("4"), "gave no log-probabilities"),
        (JudgeText("4", ["4"], [[("4", -math.inf)]]), "gave no probability to any rating"),
    ],
)
def test_what_has_no_expected_rating_is_an_error(text: JudgeText, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        expected_rating("r", text, 1, 5)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {"content": None}, "text": None}]},
        {"error": {"message": "busy"}},
    ],
)
def test_an_answer_of_another_form_is_an_error(answer: Any) -> None:
    for read in (read_chat, read_completion):
        with pytest.raises(RewardError, match=r"answered no text|did not answer as OpenAI's API"):
            read("r", answer)


@pytest.mark.parametrize("logprob", [float("nan"), 0.5, "x", None])
def test_log_probabilities_that_are_none_are_an_error(logprob: Any) -> None:
    top = [{"token": "4", "logprob": logprob}]
    chat = {"choices": [{"message": {"content": "4"}, "logprobs": {"content": [{"token": "4", "top_logprobs": top}]}}]}
    with pytest.raises(RewardError, match="another form"):
        read_chat("r", chat)
    completion = {"choices": [{"text": "4", "logprobs": {"tokens": ["4"], "top_logprobs": [{"4": logprob}]}}]}
    with pytest.raises(RewardError, match="another form"):
        read_completion("r", completion)
    completion["choices"][0]["logprobs"] = {"tokens": ["4", "5"], "top_logprobs": [{"4": 0.0}]}
    with pytest.raises(RewardError, match="another form"):
        read_completion("r", completion)
