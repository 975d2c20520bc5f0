"""Answers and stream chunks in OpenAI's shapes, made from the engine's choices.

The gateway always asks the engine for token ids and log-probabilities; what the caller did not ask for is left out
here.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from typing_extensions import override

from trimtab_server.api.chat_request import ChatBody
from trimtab_server.api.completion_request import CompletionBody
from trimtab_server.api.selection_report import candidate_object, selection_object
from trimtab_server.api.steering_report import STEERING_HEADER, steering_header, steering_of
from trimtab_server.decoding.choice_delta import ChoiceDelta
from trimtab_server.decoding.job import GenerationJob, JobResult
from trimtab_server.decoding.logprobs import steering_logprobs
from trimtab_server.decoding.usage import plain_usage, total_usage
from trimtab_server.engine.base import Candidate


class Answer(ABC):
    """One request's answer, whole or in chunks."""

    whole_object: str
    chunk_object: str

    def __init__(self, job: GenerationJob) -> None:
        self._job = job
        self._created = int(time.time())
        self._is_first_chunk = True

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        header = steering_header(self._job)
        return {STEERING_HEADER: header} if header else {}

    def whole(self, result: JobResult) -> dict[str, Any]:
        """The complete answer."""
        choices = []
        for index, selection in result.choices():
            choice = {"index": index, **self._choice(selection.candidate, index // self._job.n)}
            if self._job.selection is not None:
                prompt = result.prompts[index // self._job.n]
                choice["selection"] = selection_object(self._job.selection, selection, prompt)
            if self._job.steering_logprobs:
                choice["steering_logprobs"] = steering_logprobs(selection.candidate)
            if self._job.explains:
                choice["explain"] = selection.candidate.explanation
            choices.append(choice)
        return {
            **self._head(self.whole_object),
            "choices": choices,
            "usage": total_usage(result.prompts),
            **self._beside_choices(result),
            **self._candidates(result),
            **self._steering(),
        }

    def chunk(self, piece: ChoiceDelta, *, include_usage: bool, continuous_usage: bool) -> dict[str, Any] | None:
        """The chunk for a piece; None when there is nothing in it for this caller."""
        choice = self._chunk_choice(piece)
        if choice is None:
            return None
        if piece.candidate is not None and self._job.steering_logprobs:
            choice["steering_logprobs"] = steering_logprobs(piece.candidate)
        if piece.explanation is not None:
            choice["explain"] = piece.explanation
        if piece.selection is not None and piece.prompt is not None and self._job.selection is not None:
            choice["selection"] = selection_object(self._job.selection, piece.selection, piece.prompt)
        chunk = {**self._head(self.chunk_object), "choices": [{"index": piece.index, **choice}]}
        if include_usage:
            usage = plain_usage(piece.num_prompt_tokens, piece.num_tokens)
            chunk["usage"] = usage if continuous_usage else None
        chunk.update(self._beside_chunk_choice(piece))
        if self._is_first_chunk or (piece.is_last and not include_usage):
            chunk.update(self._steering())
        self._is_first_chunk = False
        return chunk

    def usage_chunk(self, result: JobResult) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`."""
        return {
            **self._head(self.chunk_object),
            "choices": [],
            "usage": total_usage(result.prompts),
            **self._candidates(result),
            **self._steering(),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._job.id, "object": kind, "created": self._created, "model": self._job.resolved.model}

    def _candidates(self, result: JobResult) -> dict[str, Any]:
        """All candidates of all prompts and what was left out, where that was asked for."""
        if self._job.selection is None or not self._job.selection.return_candidates:
            return {}
        listed = []
        for prompt_index, prompt in enumerate(result.prompts):
            for selection in prompt.selections:
                candidate = selection.candidate
                shown = self._choice(candidate, prompt_index)
                listed.append(
                    {
                        "prompt_index": prompt_index,
                        "index": candidate.index,
                        **shown,
                        "finish_reason": candidate.finish_reason,
                        **candidate_object(selection, self._job.n),
                    }
                )
        return {"candidates": listed}

    def _steering(self) -> dict[str, Any]:
        """What steered, and on which side of its route's canary the request is."""
        steering, canary = steering_of(self._job), self._job.resolved.canary
        fields: dict[str, Any] = {} if steering is None else {"steering": steering}
        return fields if canary is None else {**fields, "canary": asdict(canary)}

    @abstractmethod
    def _choice(self, candidate: Candidate, prompt_index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, piece: ChoiceDelta) -> dict[str, Any] | None: ...

    def _beside_choices(self, result: JobResult) -> dict[str, Any]:
        return {}

    def _beside_chunk_choice(self, piece: ChoiceDelta) -> dict[str, Any]:
        return {}


class CompletionAnswer(Answer):
    """Legacy completions.

    Args:
        job: The request.
        body: What the caller asked to see.
        echoes: The texts of the prompts when they are to be echoed.
    """

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, job: GenerationJob, body: CompletionBody, echoes: Sequence[str] | None = None) -> None:
        super().__init__(job)
        self._body = body
        self._echoes = echoes

    @override
    def _choice(self, candidate: Candidate, prompt_index: int) -> dict[str, Any]:
        raw, body = candidate.choice, self._body
        choice = {
            "text": self._echo(prompt_index) + candidate.text,
            "logprobs": raw.get("logprobs") if body.wants_logprobs else None,
            "finish_reason": candidate.finish_reason,
            "stop_reason": raw.get("stop_reason"),
        }
        if body.return_token_ids:
            choice |= {"token_ids": candidate.token_ids, "prompt_token_ids": candidate.prompt_token_ids}
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = raw.get("prompt_logprobs")
        if raw.get("routed_experts") is not None:
            choice["routed_experts"] = raw["routed_experts"]
        return choice

    @override
    def _chunk_choice(self, piece: ChoiceDelta) -> dict[str, Any] | None:
        raw, body = piece.delta.choice, self._body
        choice = {
            "text": (self._echo(piece.prompt_index) if piece.is_first else "") + (raw.get("text") or ""),
            "logprobs": raw.get("logprobs") if body.wants_logprobs else None,
            "finish_reason": raw.get("finish_reason"),
            "stop_reason": raw.get("stop_reason"),
        }
        if body.return_token_ids:
            choice["token_ids"] = piece.delta.token_ids
            if piece.delta.prompt_token_ids is not None:
                choice["prompt_token_ids"] = piece.delta.prompt_token_ids
        return choice

    def _echo(self, prompt_index: int) -> str:
        return self._echoes[prompt_index] if self._echoes is not None else ""


class ChatAnswer(Answer):
    """Chat completions. A chat has one prompt; vLLM's fields about it stand beside the choices."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, job: GenerationJob, body: ChatBody) -> None:
        super().__init__(job)
        self._body = body

    @override
    def _choice(self, candidate: Candidate, prompt_index: int) -> dict[str, Any]:
        raw, body = candidate.choice, self._body
        choice = {
            "message": raw["message"],
            "logprobs": raw.get("logprobs") if body.wants_logprobs else None,
            "finish_reason": candidate.finish_reason,
            "stop_reason": raw.get("stop_reason"),
        }
        if body.return_token_ids:
            choice["token_ids"] = candidate.token_ids
        if raw.get("routed_experts") is not None:
            choice["routed_experts"] = raw["routed_experts"]
        return choice

    @override
    def _chunk_choice(self, piece: ChoiceDelta) -> dict[str, Any] | None:
        raw, body = piece.delta.choice, self._body
        delta, finish_reason = raw.get("delta") or {}, raw.get("finish_reason")
        shows_tokens = body.wants_logprobs or body.return_token_ids or piece.explanation is not None
        if not delta and finish_reason is None and not shows_tokens:
            return None  # the engine only sent it for the ids that the gateway asked for
        choice = {
            "delta": delta,
            "logprobs": raw.get("logprobs") if body.wants_logprobs else None,
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = raw.get("stop_reason")
        if body.return_token_ids and piece.delta.token_ids:
            choice["token_ids"] = piece.delta.token_ids
        return choice

    @override
    def _beside_choices(self, result: JobResult) -> dict[str, Any]:
        candidate = result.prompts[0].candidates[0]
        fields: dict[str, Any] = {}
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = candidate.prompt_token_ids
        for name, is_asked in (
            ("prompt_logprobs", self._body.prompt_logprobs is not None),
            ("prompt_text", bool(self._body.return_prompt_text)),
        ):
            if is_asked:
                fields[name] = candidate.choice.get(name)
        return fields

    @override
    def _beside_chunk_choice(self, piece: ChoiceDelta) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._body.return_token_ids and piece.delta.prompt_token_ids is not None:
            fields["prompt_token_ids"] = piece.delta.prompt_token_ids
        if self._body.return_prompt_text and piece.delta.choice.get("prompt_text"):
            fields["prompt_text"] = piece.delta.choice["prompt_text"]
        return fields
