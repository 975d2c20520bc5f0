import json
from collections.abc import Callable

import httpx
import pytest

from trimtab_adapters.contract.errors import EngineError, EngineUnavailableError, InvalidRequestError
from trimtab_training.demo.gateway import Gateway


def _gateway(handler: Callable[[httpx.Request], httpx.Response]) -> Gateway:
    return Gateway("http://gateway", concurrency=2, transport=httpx.MockTransport(handler))


def _completion(texts: list[str]) -> httpx.Response:
    logprobs = {"base": [-1.0], "kl": [0.5]}
    choices = [{"index": i, "text": text, "steering_logprobs": logprobs} for i, text in enumerate(texts)]
    return httpx.Response(
        200, json={"choices": choices[::-1], "usage": {"completion_tokens": 7, "reference_tokens": 3}}
    )


def test_answers_come_in_the_order_of_bodies_and_choices_with_what_they_cost() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        prompt = json.loads(request.content)["prompt"]
        return _completion([f"{prompt}0", f"{prompt}1"])

    done: list[None] = []
    with _gateway(handler) as gateway:
        answers = gateway.complete([{"prompt": p} for p in "abcde"], on_done=lambda: done.append(None))
    assert [[a.text for a in choices] for choices in answers] == [[f"{p}0", f"{p}1"] for p in "abcde"]
    assert len(done) == 5
    first = answers[0][0]
    assert (first.base_logprobs, first.kl, first.num_tokens, first.num_reference_tokens) == ([-1.0], [0.5], 7, 3)


def test_the_first_refusal_is_raised_with_the_gateways_message_and_the_rest_is_not_sent() -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["prompt"])
        return httpx.Response(400, json={"error": {"message": "too long", "param": "prompt", "code": None}})

    with _gateway(handler) as gateway, pytest.raises(InvalidRequestError, match="too long"):
        gateway.complete([{"prompt": str(i)} for i in range(500)])
    assert len(seen) < 500


def test_a_gateway_that_is_away_is_not_ready_and_a_call_to_it_says_so() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with _gateway(handler) as gateway:
        assert not gateway.is_ready()
        with pytest.raises(EngineUnavailableError, match="/admin/training-jobs/job-1: refused"):
            gateway.job("job-1")


def test_a_503_is_not_ready() -> None:
    with _gateway(lambda _: httpx.Response(503)) as gateway:
        assert not gateway.is_ready()
    with _gateway(lambda _: httpx.Response(200)) as gateway:
        assert gateway.is_ready()


def _events(*lines: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(200, text="".join(f"{line}\n\n" for line in lines))


def test_a_stream_yields_its_chunks_up_to_done() -> None:
    with _gateway(_events('data: {"a": 1}', ": comment", 'data: {"a": 2}', "data: [DONE]")) as gateway:
        assert list(gateway.stream({})) == [{"a": 1}, {"a": 2}]


def test_a_stream_with_an_error_event_or_without_done_is_an_error() -> None:
    died = _events('data: {"error": {"message": "the engine died"}}')
    with _gateway(died) as gateway, pytest.raises(EngineError, match="the engine died"):
        list(gateway.stream({}))
    with _gateway(_events('data: {"a": 1}')) as gateway, pytest.raises(EngineError, match="without"):
        list(gateway.stream({}))
    refused = httpx.Response(400, json={"error": {"message": "bad", "param": None, "code": None}})
    with _gateway(lambda _: refused) as gateway, pytest.raises(InvalidRequestError, match="bad"):
        list(gateway.stream({}))
