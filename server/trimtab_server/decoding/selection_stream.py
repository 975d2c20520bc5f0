"""A streamed job whose choices are chosen: block by block where they are decided so, else whole once they are known."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from trimtab_adapters.contract.selection import Blockwise
from trimtab_server.decoding.candidates import Selection
from trimtab_server.decoding.choice_delta import ChoiceDelta
from trimtab_server.decoding.generation import Generator
from trimtab_server.decoding.job import GenerationJob, JobResult, PromptResult
from trimtab_server.engine.base import Candidate, EngineDelta

_MAX_GAP = 2
"""Most characters between the texts of two tokens that neither of them shows."""

PIECE_TOKENS = 8
"""Tokens of a chunk of a choice that is sent after it was chosen."""


class SelectionStream:
    """A stream with the interface of `JobStream`; it gives None where there is nothing to say but that it is alive.

    Args:
        generator: Does the work.
        job: What to do. One prompt with one choice where its strategy decides piece by piece.
        keep_alive_s: Longest silence.
    """

    def __init__(self, generator: Generator, job: GenerationJob, *, keep_alive_s: float) -> None:
        self._generator = generator
        self._job = job
        self._keep_alive_s = keep_alive_s
        self._blocks: asyncio.Queue[EngineDelta] = asyncio.Queue()
        self._work: asyncio.Task[JobResult] | None = None
        self._waiting: asyncio.Task[EngineDelta] | None = None
        self._ahead: EngineDelta | None = None
        self._late: Iterator[ChoiceDelta] | None = None
        self._num_tokens = 0
        self._num_prompt_tokens = 0

    async def start(self) -> None:
        """Wait for the first piece, but not longer than for the first sign of life. Call `aclose` in the end.

        Errors before that keep their status; those after it become events of the stream.
        """
        emit = self._blocks.put if isinstance(self._job.selection, Blockwise) else None
        self._work = asyncio.create_task(self._generator.complete(self._job, emit))
        self._ahead = await self._next_block()

    def __aiter__(self) -> "SelectionStream":
        return self

    async def __anext__(self) -> ChoiceDelta | None:
        """The next piece of any choice; None as a sign of life."""
        assert self._work is not None, "start() comes first"
        if self._late is None:
            block, self._ahead = self._ahead, None
            if block is None:
                block = await self._next_block()
            if block is not None:
                return self._block_piece(block)
            if not self._work.done():
                return None
            self._late = self._remaining(self._work.result())
        piece = next(self._late, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def result(self) -> JobResult:
        """After the last piece."""
        assert self._work is not None, "start() comes first"
        return await self._work

    async def aclose(self) -> None:
        """Abort what still runs."""
        tasks = [task for task in (self._work, self._waiting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _next_block(self) -> EngineDelta | None:
        """The next block; None at the end of the work, or after a silence. Raises the error of the work."""
        assert self._work is not None
        if self._blocks.empty():
            self._waiting = self._waiting or asyncio.create_task(self._blocks.get())
            await asyncio.wait(
                {self._work, self._waiting}, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not self._waiting.done():
                if self._work.done():
                    self._work.result()
                return None
            block, self._waiting = self._waiting.result(), None
            return block
        return self._blocks.get_nowait()

    def _block_piece(self, block: EngineDelta) -> ChoiceDelta:
        is_first = self._num_tokens == 0
        self._num_tokens += len(block.token_ids)
        if block.prompt_token_ids is not None:
            self._num_prompt_tokens = len(block.prompt_token_ids)
        # What ends the choice comes with its reward, when that is known.
        choice = {**block.choice, "finish_reason": None, "stop_reason": None}
        return self._piece(
            0, EngineDelta(choice, block.token_ids, block.token_logprobs, block.prompt_token_ids), is_first
        )

    def _remaining(self, result: JobResult) -> Iterator[ChoiceDelta]:
        """What has not been said of the choices yet: everything, or of blocks only the end."""
        choices = list(result.choices())
        for number, (index, selection) in enumerate(choices):
            self._num_prompt_tokens = len(selection.candidate.prompt_token_ids)
            is_streamed = isinstance(self._job.selection, Blockwise)
            if not is_streamed:
                self._num_tokens = 0
            pieces = [] if is_streamed else list(pieces_of(self._job, selection.candidate))
            pieces.append(_end(self._job, selection.candidate))
            for i, delta in enumerate(pieces):
                self._num_tokens += len(delta.token_ids)
                is_end = i == len(pieces) - 1
                yield self._piece(
                    index,
                    delta,
                    i == 0 and not is_streamed,
                    selection=selection if is_end else None,
                    prompt=result.prompts[index // self._job.n] if is_end else None,
                    is_last=is_end and number == len(choices) - 1,
                )

    def _piece(
        self,
        index: int,
        delta: EngineDelta,
        is_first: bool,
        *,
        selection: Selection | None = None,
        prompt: PromptResult | None = None,
        is_last: bool = False,
    ) -> ChoiceDelta:
        return ChoiceDelta(
            index=index,
            prompt_index=index // self._job.n,
            delta=delta,
            is_first=is_first,
            is_last=is_last,
            num_tokens=self._num_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            explanation=selection.candidate.explanation if selection is not None else None,
            candidate=selection.candidate if selection is not None else None,
            selection=selection,
            prompt=prompt,
        )


def pieces_of(job: GenerationJob, candidate: Candidate) -> Iterator[EngineDelta]:
    """A finished candidate as the engine would have streamed it, without its end.

    Pieces follow the tokens where the tokens' texts make up the text; else, and where a message has more than text, it
    is one piece.
    """
    num_tokens = len(candidate.token_ids)
    texts = _token_texts(job, candidate)
    size = PIECE_TOKENS if texts is not None else max(1, num_tokens)
    for start in range(0, max(1, num_tokens), size):
        end = min(start + size, num_tokens)
        text = "".join(texts[start:end]) if texts is not None else candidate.text
        choice: dict[str, Any] = {"index": 0, "finish_reason": None, "stop_reason": None}
        logprobs = candidate.choice.get("logprobs")
        if job.endpoint == "completions":
            choice |= {"text": text, "logprobs": _sliced(logprobs, start, end, num_tokens)}
        else:
            choice |= {"delta": _message_delta(candidate, text, is_first=start == 0)}
            choice["logprobs"] = _sliced(logprobs, start, end, num_tokens)
        yield EngineDelta(
            choice=choice,
            token_ids=candidate.token_ids[start:end],
            token_logprobs=candidate.token_logprobs[start:end],
            prompt_token_ids=candidate.prompt_token_ids if start == 0 else None,
        )


def _end(job: GenerationJob, candidate: Candidate) -> EngineDelta:
    nothing: dict[str, Any] = {"text": ""} if job.endpoint == "completions" else {"delta": {}}
    reasons = {"finish_reason": candidate.finish_reason, "stop_reason": candidate.choice.get("stop_reason")}
    return EngineDelta(choice={"index": 0, "logprobs": None, **nothing, **reasons})


def _token_texts(job: GenerationJob, candidate: Candidate) -> list[str] | None:
    """The text of each token; None where they do not make up the text."""
    logprobs = candidate.choice.get("logprobs") or {}
    if job.endpoint == "completions":
        texts = logprobs.get("tokens") or []
    else:
        texts = [entry.get("token") for entry in logprobs.get("content") or []]
    texts = texts[len(texts) - len(candidate.token_ids) :]  # those of an echoed prompt come first
    if len(texts) != len(candidate.token_ids):
        return None
    return _aligned(texts, candidate.text)


def _aligned(tokens: Sequence[str], text: str) -> list[str] | None:
    """A text cut behind each of its tokens; None where they are not found in it one after the other.

    Some tokenizers show a token without the space before it, and what ended the answer is not part of its text.
    """
    pieces, end = [], 0
    for token in tokens:
        at = text.find(token.strip(), end)
        if not end <= at <= end + _MAX_GAP:
            break
        pieces.append(text[end : at + len(token.strip())])
        end += len(pieces[-1])
    if len(pieces) < len(tokens) - 1:
        return None
    pieces += [""] * (len(tokens) - len(pieces))
    if pieces:
        pieces[-1] += text[end:]
    return pieces if pieces or not text else None


def _sliced(logprobs: Any, start: int, end: int, num_tokens: int) -> Any:
    """The log-probabilities of some tokens; an echoed prompt's go with the first."""
    if not isinstance(logprobs, dict):
        return None

    def cut(values: Any) -> Any:
        if not isinstance(values, list):
            return values
        shift = len(values) - num_tokens
        return values[0 if start == 0 else start + shift : end + shift]

    return {name: cut(values) for name, values in logprobs.items()}


def _message_delta(candidate: Candidate, text: str, *, is_first: bool) -> dict[str, Any]:
    message = candidate.choice["message"]
    delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
    extras = {name: value for name, value in message.items() if name not in ("role", "content") and value}
    if is_first and extras.get("tool_calls"):
        extras["tool_calls"] = [{"index": i, **call} for i, call in enumerate(extras["tool_calls"])]
    return {**delta, "content": text or None, **(extras if is_first else {})} if extras else {**delta, "content": text}
