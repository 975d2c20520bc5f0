"""Puts the deltas of a streamed candidate together."""

import time
from typing import Any

from trimtab_server.engine.base import Candidate, EngineDelta, EngineRequest


class CandidateBuilder:
    """Collects deltas until the candidate is complete.

    The choice that it builds has text or message, log-probabilities, ids and finish reason; tool calls of a streamed
    chat message are passed on piece by piece and not put together here.
    """

    def __init__(self, request: EngineRequest, engine: str, *, index: int = 0) -> None:
        self._request = request
        self._engine = engine
        self._index = index
        self._started = time.perf_counter()
        self._text: list[str] = []
        self._logprobs: dict[str, list[Any]] = {}
        self._last: dict[str, Any] = {}
        self._duration_s = 0.0
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.prompt_token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None

    def add(self, delta: EngineDelta) -> None:
        """Take the next delta in."""
        choice = delta.choice
        self.token_ids.extend(delta.token_ids)
        self.token_logprobs.extend(delta.token_logprobs)
        if delta.prompt_token_ids is not None:
            self.prompt_token_ids = delta.prompt_token_ids
        if delta.usage is not None:
            self.usage = delta.usage
        if not choice:
            return
        self._text.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
        for key, values in (choice.get("logprobs") or {}).items():
            if isinstance(values, list):
                self._logprobs.setdefault(key, []).extend(values)
        if choice.get("finish_reason") is not None:
            self.finish_reason = choice["finish_reason"]
            self._last = choice
            self._duration_s = time.perf_counter() - self._started

    @property
    def text(self) -> str:
        """The text so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0] if self._text else ""

    def candidate(self) -> Candidate:
        """The candidate. Usage is counted from the ids where the engine sent none."""
        text = self.text
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": self._logprobs or None,
            "finish_reason": self.finish_reason,
            "stop_reason": self._last.get("stop_reason"),
            "token_ids": self.token_ids,
            "prompt_token_ids": self.prompt_token_ids,
        }
        if (restriction := self._last.get("black_box")) is not None:
            choice["black_box"] = restriction
        if self._request.endpoint == "completions":
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text}
        num_prompt, num_output = len(self.prompt_token_ids), len(self.token_ids)
        return Candidate(
            index=self._index,
            choice=choice,
            text=text,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=self.token_ids,
            token_logprobs=self.token_logprobs,
            finish_reason=self.finish_reason,
            usage=self.usage
            or {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output},
            duration_s=self._duration_s or time.perf_counter() - self._started,
            steering=self._request.steering,
            engine=self._engine,
        )
