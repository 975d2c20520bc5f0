"""A completions API over a table of bigrams, in OpenAI's or vLLM's manner, that counts and misbehaves on demand."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from scripted_server import Scripted
from tiny_models import NUM_TOKENS
from trimtab_server.engine.black_box_provider import Provider, ProviderLimits

Reply = Callable[[dict[str, Any]], httpx.Response | Exception | None]
"""What happens instead of an answer; None answers."""

FAST = ProviderLimits(timeout_s=5, deadline_s=20, max_retries=2)


def bigram_logprobs(last_token: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """`[V]` log-probabilities of the base after a token."""
    logits = np.random.default_rng(1000 + last_token).normal(0, 2, NUM_TOKENS)
    logprobs: np.ndarray[Any, np.dtype[np.float64]] = logits - np.log(np.exp(logits).sum())
    return logprobs


@dataclass
class FakeProvider:
    """The API.

    Attributes:
        api: `openai` writes tokens as text, `vllm` as ids where it is asked to.
        replies: What happens to the next calls, one each.
        bodies: What was asked of `/completions`.
        headers: Of the last request.
        eos_ends: Whether drawing `<eos>` ends an answer.
    """

    api: str = "openai"
    replies: list[Reply] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    models_status: int = 200
    eos_ends: bool = True

    def client(self, api_key: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        return httpx.AsyncClient(transport=httpx.MockTransport(self._handle), headers=headers)

    def provider(self, limits: ProviderLimits = FAST, api_key: str | None = None) -> Provider:
        return Provider("http://provider.test/v1", "big-model", self.client(api_key), limits)

    def over_http(self, path: str, body: Any) -> Scripted:
        """The same as an answer of `scripted_server`."""
        response = self._handle(httpx.Request("POST", f"http://provider.test{path}", json=body))
        kind = {"content-type": response.headers["content-type"]} if "content-type" in response.headers else {}
        return Scripted(response.status_code, response.content, kind)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.headers = dict(request.headers)
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(self.models_status, json={"data": [{"id": "big-model"}]})
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.replies and (outcome := self.replies.pop(0)(body)) is not None:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        answer = self.answer(body)
        if not body["stream"]:
            return httpx.Response(200, json=answer)
        chunks = [{**answer, "usage": None}, {"choices": [], "usage": answer["usage"]}]
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return httpx.Response(
            200, text="".join([*events, "data: [DONE]\n\n"]), headers={"content-type": "text/event-stream"}
        )

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = (
            [0 if word == "<eos>" else int(word[1:]) for word in prompt.split()] if isinstance(prompt, str) else prompt
        )
        num = body.get("n", 1)
        choices = [self._choice(index, ids, body) for index in range(num)]
        num_output = sum(len(choice["logprobs"]["tokens"]) for choice in choices)
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": num_output,
            "total_tokens": len(ids) + num_output,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        return {"id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": usage}

    def _choice(self, index: int, prompt: Sequence[int], body: dict[str, Any]) -> dict[str, Any]:
        """Greedy at temperature 0; else the least probable token, which must never be taken for one of the top."""
        ids, tokens, values, tops, finish = list(prompt), [], [], [], "length"
        for _ in range(body["max_tokens"]):
            logprobs = bigram_logprobs(ids[-1])
            token = int(logprobs.argmax() if body.get("temperature") == 0 else logprobs.argmin())
            best = np.argsort(-logprobs)[: body["logprobs"]].tolist()
            shown = {self._name(i, body): float(logprobs[i]) for i in [token, *best]}
            ids.append(token)
            tokens.append(self._name(token, body))
            values.append(float(logprobs[token]))
            tops.append(shown)
            if token == 0 and self.eos_ends:
                finish = "stop"
                break
        words = [f"t{i}" for i in ids[len(prompt) :] if i]
        return {
            "index": index,
            "text": "".join(f" {word}" for word in words),
            "logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": []},
            "finish_reason": finish,
        }

    def _name(self, token: int, body: dict[str, Any]) -> str:
        if self.api == "vllm" and body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        return "<eos>" if token == 0 else f"t{token}"


def refusal(status: int, message: str = "no", headers: dict[str, str] | None = None, **error: Any) -> Reply:
    """An answer with an error status."""
    return lambda _: httpx.Response(status, json={"error": {"message": message, **error}}, headers=headers)


def without_logprobs(body: dict[str, Any]) -> httpx.Response:
    """An answer as of a provider that shows nothing when the sampled token ends the text."""
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
    return httpx.Response(200, json={"choices": [choice], "usage": usage})
