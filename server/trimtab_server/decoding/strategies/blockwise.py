"""Blockwise best of K: the answer grows by blocks of tokens, each the best of N continuations of what there is.

Controlled decoding's blockwise procedure (arXiv 2310.17022). Every continuation is a request of its own that starts
from the token ids of prompt and answer so far; the engine finds them in its prefix cache.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.contract.selection import Blockwise
from trimtab_server.decoding.candidates import ranked
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.logprobs import checked_record, joined_records
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.engine.base import Candidate, EngineDelta

Emit = Callable[[EngineDelta], Awaitable[None]]
"""Takes each block as soon as it is chosen."""

_PARTIAL = "\ufffd"
"""What a token shows that ends inside a character."""


@dataclass(slots=True)
class _Answer:
    """The answer so far."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    records: list[SteeringRecord] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_blocks: int = 0
    discarded_tokens: int = 0
    num_shown: int = 0


async def blockwise(run: PromptRun, params: Blockwise, emit: Emit | None = None) -> PromptResult:
    """One answer; `emit` gets it piece by piece."""
    started = time.perf_counter()
    answer = _Answer(await run.prompt_token_ids())
    max_tokens = run.job.max_tokens
    assert max_tokens is not None, "admission asks for max_tokens"
    while answer.finish_reason is None:
        size = min(params.block_tokens, max_tokens - len(answer.token_ids))
        blocks = await _continuations(run, answer, size)
        texts = {block.index: _Text.of(answer.text, block, run.job.body) for block in blocks}
        wholes = {index: text.whole for index, text in texts.items()}
        values = await run.judge_texts(answer.prompt_token_ids, wholes, reward=params.prefix_reward)
        run.check_enough(len(values))
        best = ranked([(block, values[block.index]) for block in blocks if block.index in values])[0].candidate
        answer.discarded_tokens += sum(len(block.token_ids) for block in blocks if block is not best)
        tokens_before, shown_before = len(answer.token_ids), answer.num_shown
        await _extend(run, answer, best, texts[best.index], is_last=tokens_before + len(best.token_ids) >= max_tokens)
        if emit is not None:
            await emit(_delta(run, answer, tokens_before, shown_before))
    candidate = _candidate(run, answer, time.perf_counter() - started)
    result = PromptResult(ranked(await run.score([candidate])), discarded_tokens=answer.discarded_tokens)
    result.outcome = {"num_blocks": answer.num_blocks, "discarded_tokens": answer.discarded_tokens}
    return result


async def _continuations(run: PromptRun, answer: _Answer, size: int) -> list[Candidate]:
    requests = [
        run.job.block_request(run.index, answer.prompt_token_ids, answer.token_ids, answer.num_blocks, k, size)
        for k in range(run.num_candidates)
    ]
    return await run.generate_requests(requests)


@dataclass(frozen=True, slots=True)
class _Text:
    """The text with one more block, cut at a stop string that begins before the block and ends in it."""

    whole: str
    stop: str | None = None
    needed: int = 0

    @classmethod
    def of(cls, before: str, block: Candidate, body: dict[str, Any]) -> "_Text":
        joined = before + block.text
        for stop in body.get("stop") or ():
            # The engine sees the block alone, so it finds every other occurrence itself.
            at = joined.find(stop, max(0, len(before) - len(stop) + 1), len(before) + len(stop) - 1)
            if at >= 0:
                end = at + len(stop)
                return cls(joined[: end if body.get("include_stop_str_in_output") else at], stop, end - len(before))
        return cls(joined)


async def _extend(run: PromptRun, answer: _Answer, block: Candidate, text: _Text, *, is_last: bool) -> None:
    """Take the chosen block into the answer."""
    tokens: list[str] = (block.choice.get("logprobs") or {}).get("tokens") or []
    num = len(block.token_ids) if text.stop is None else _tokens_for(tokens, text.needed, len(block.token_ids))
    answer.discarded_tokens += len(block.token_ids) - num
    if block.steering is not None and block.steering.record:
        found = await run.engine.take_records([block.steering.uid])
        answer.records.append(checked_record(block, found.get(block.steering.uid), num))
    is_split = bool(tokens) and (_PARTIAL in tokens[0] or _PARTIAL in tokens[-1])
    shift = len(answer.text)
    for key, values in (block.choice.get("logprobs") or {}).items():
        if isinstance(values, list):
            moved = [value + shift for value in values] if key == "text_offset" else values
            answer.logprobs.setdefault(key, []).extend(moved[:num])
    answer.token_ids += block.token_ids[:num]
    answer.token_logprobs += block.token_logprobs[:num]
    answer.text = text.whole
    answer.num_blocks += 1
    if text.stop is not None:
        answer.finish_reason, answer.stop_reason = "stop", text.stop
    elif block.finish_reason != "length" or is_last:
        answer.finish_reason, answer.stop_reason = block.finish_reason, block.choice.get("stop_reason")
    elif is_split:
        # A character lies in two blocks; each alone has lost it.
        answer.text = await _detokenized(run, answer)
    held = 0 if answer.finish_reason is not None else _held_back(answer.text, run.job.body)
    answer.num_shown = max(answer.num_shown, len(answer.text) - held)


async def _detokenized(run: PromptRun, answer: _Answer) -> str:
    prompt, whole = await asyncio.gather(
        run.detokenize(answer.prompt_token_ids), run.detokenize(answer.prompt_token_ids + answer.token_ids)
    )
    return whole[len(prompt) :].rstrip(_PARTIAL) if whole.startswith(prompt) else answer.text


def _tokens_for(tokens: Sequence[str], num_chars: int, num_tokens: int) -> int:
    """How many tokens it takes to say so many characters."""
    said = 0
    for i, token in enumerate(tokens):
        said += len(token)
        if said >= num_chars:
            return i + 1
    return num_tokens


def _held_back(text: str, body: dict[str, Any]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    if body.get("include_stop_str_in_output"):
        return 0
    longest = 0
    for stop in body.get("stop") or ():
        longest = max([longest, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
    return longest


def _delta(run: PromptRun, answer: _Answer, tokens_before: int, shown_before: int) -> EngineDelta:
    """The new piece of the answer, as an engine would have streamed it."""
    piece = answer.text[shown_before : answer.num_shown]
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    if run.job.endpoint == "completions":
        choice |= {"text": piece, "logprobs": {key: values[tokens_before:] for key, values in answer.logprobs.items()}}
    else:
        choice["delta"] = {"content": piece}
    return EngineDelta(
        choice=choice,
        token_ids=answer.token_ids[tokens_before:],
        token_logprobs=answer.token_logprobs[tokens_before:],
        prompt_token_ids=answer.prompt_token_ids if tokens_before == 0 else None,
    )


def _candidate(run: PromptRun, answer: _Answer, duration_s: float) -> Candidate:
    """The whole answer, as an engine would have given it."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "token_ids": answer.token_ids,
        "prompt_token_ids": answer.prompt_token_ids,
    }
    if run.job.endpoint == "completions":
        choice |= {"text": answer.text, "logprobs": answer.logprobs or None}
    else:
        choice["message"] = {"role": "assistant", "content": answer.text}
    num_prompt, num_output = len(answer.prompt_token_ids), len(answer.token_ids)
    steering = run.job.steering(f"{run.job.id}-{run.index}-0")
    return Candidate(
        index=0,
        choice=choice,
        text=answer.text,
        prompt_token_ids=answer.prompt_token_ids,
        token_ids=answer.token_ids,
        token_logprobs=answer.token_logprobs,
        finish_reason=answer.finish_reason,
        usage={
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
        duration_s=duration_s,
        steering=steering,
        record=joined_records(steering.uid, answer.records) if steering is not None and answer.records else None,
        engine=run.engine.name,
    )
