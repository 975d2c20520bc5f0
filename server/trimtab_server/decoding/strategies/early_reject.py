"""Early rejection: N candidates start, and at checkpoints those whose text so far is worst are stopped.

As speculative rejection does (arXiv 2410.20290), with checkpoints at numbers of tokens instead of where memory is full.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import TypeVar

from trimtab_adapters.contract.selection import EarlyReject
from trimtab_server.decoding.candidates import CandidateState, ranked
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.decoding.running import RunningCandidate
from trimtab_server.engine.base import Candidate

T = TypeVar("T")


def checkpoints_of(params: EarlyReject, max_tokens: int | None) -> list[int]:
    """Numbers of tokens at which candidates are judged."""
    if params.checkpoints is not None:
        return params.checkpoints
    assert max_tokens is not None, "admission asks for max_tokens where there are no checkpoints"
    return sorted({max(1, max_tokens // 4), max(1, max_tokens // 2)})


async def early_reject(run: PromptRun, params: EarlyReject) -> PromptResult:
    """The best of the candidates that were not stopped; those that were come last."""
    checkpoints = checkpoints_of(params, run.job.max_tokens)
    rivals = [run.start(index) for index in range(run.num_candidates)]
    everyone = list(rivals)
    for checkpoint in checkpoints:
        there = await _all(run.reached(running, checkpoint) for running in rivals)
        rivals = [running for running, is_there in zip(rivals, there, strict=True) if is_there]
        if all(running.is_finished and running.num_tokens <= checkpoint for running in rivals):
            break  # nobody is left to be stopped
        rivals = await _survivors(run, params, rivals, checkpoint)
    complete: list[Candidate] = []
    others: list[tuple[Candidate, CandidateState]] = []
    for running, candidate in zip(everyone, await _all(run.result(running) for running in everyone), strict=True):
        if running.is_stopped:
            others.append((await run.stopped(running), "stopped"))
        elif candidate is not None and running.is_given_up:
            others.append((candidate, "late"))
        elif candidate is not None:
            complete.append(candidate)
    scored = await run.score(complete)
    outcome = {"checkpoints": checkpoints, "num_stopped": len(others)}
    return PromptResult(ranked(scored, others), outcome=outcome)


async def _survivors(
    run: PromptRun, params: EarlyReject, rivals: Sequence[RunningCandidate], checkpoint: int
) -> list[RunningCandidate]:
    """Judge all rivals by what they had at the checkpoint and stop the worst.

    A candidate that ended before is judged whole. It is never stopped, but when it is among the worst it does not take
    a place from those that go on.
    """
    texts = {running.index: await _text_at(run, running, checkpoint) for running in rivals}
    prompt_token_ids = next((r.prompt_token_ids for r in rivals if r.prompt_token_ids), [])
    values = await run.judge_texts(prompt_token_ids, texts, reward=params.prefix_reward)
    num_kept = max(run.n, round(params.keep * len(values)))

    def worst_last(index: int) -> tuple[float, float, int]:
        return -(values[index].calibrated or 0.0), -values[index].raw, index

    kept = set(sorted(values, key=worst_last)[:num_kept])
    for running in rivals:
        # By its tokens, not by whether it has ended meanwhile: the same seed must give up the same candidates.
        if running.index not in kept and not (running.is_finished and running.num_tokens <= checkpoint):
            running.give_up()
    return [running for running in rivals if running.index in kept]


async def _text_at(run: PromptRun, running: RunningCandidate, num_tokens: int) -> str:
    text = running.text_at(num_tokens)
    return text if text is not None else await run.detokenize(running.first_token_ids(num_tokens))


async def _all(works: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order, or the first error; what still runs then is stopped by `PromptRun.aclose`."""
    return list(await asyncio.gather(*works))
