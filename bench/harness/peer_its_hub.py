"""its_hub's `BestOfN` as a library, driven over standard input and output. Runs in a virtual environment of its own.

    python -P peer_its_hub.py ENDPOINT MODEL BUDGET SCORE_URL

Each line is a JSON object with `messages` and `params`; each answer a JSON line with `text`, `usage` and `wall_s`, or
`error`. Candidates are scored by a reward of a Trimtab gateway, over HTTP.
"""

import asyncio
import json
import os
import sys
import time
import urllib.request
from typing import Any

from its_hub.api import AbstractOutcomeRewardModel  # type: ignore[import-not-found]
from its_hub.core.algorithms.bon import BestOfN  # type: ignore[import-not-found]
from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel  # type: ignore[import-not-found]

_TAKEN = ("temperature", "max_tokens", "stop")
"""The sampling parameters that its language model takes."""


class HttpReward(AbstractOutcomeRewardModel):
    """A reward of the gateway as its_hub's outcome reward model."""

    def __init__(self, url: str) -> None:
        self._url = url

    def score(self, messages: Any, **kwargs: Any) -> list[float]:
        inputs = [{"prompt": conversation[0].content, "output": conversation[-1].content} for conversation in messages]
        request = urllib.request.Request(
            self._url, json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            scores: list[float] = json.load(response)["rewards"]
        return scores

    async def ascore(self, messages: Any, orchestrator: Any = None, **kwargs: Any) -> list[float]:
        return await asyncio.to_thread(self.score, messages)


async def main(endpoint: str, model: str, budget: str, score_url: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    algorithm = BestOfN(HttpReward(score_url))
    models: dict[str, Any] = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        taken = {key: value for key, value in asked["params"].items() if key in _TAKEN}
        key = json.dumps(taken, sort_keys=True)
        if key not in models:
            models[key] = OpenAICompatibleLanguageModel(endpoint, "none", model, **taken)
        started = time.perf_counter()
        try:
            found = await algorithm.ainfer(
                models[key], asked["messages"][-1]["content"], int(budget), return_response_only=False
            )
            answer: dict[str, Any] = {
                "text": found.the_one["content"],
                "usage": {
                    "prompt_tokens": found.usage.prompt_tokens,
                    "completion_tokens": found.usage.completion_tokens,
                },
                "wall_s": time.perf_counter() - started,
            }
        except Exception as exc:  # noqa: BLE001 - a peer's failure is a row of the table
            answer = {"error": f"{type(exc).__name__}: {exc}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
