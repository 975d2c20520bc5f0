"""Early rejection: N candidates start, and at checkpoints those whose text so far is worst are stopped.

As speculative rejection does (arXiv 2410.20290), with checkpoints at numbers of tokens instead of where memory is full.
Candidates run to a checkpoint, wait there for the verdict, and go on from their token ids, so that no token is spent on
those that are out, however fast the engine is.
"""

from collections.abc import Sequence

from trimtab_adapters.contract.selection import EarlyReject
from trimtab_server.decoding.candidates import CandidateState, ranked
from trimtab_server.decoding.growing import GrowingAnswer
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.engine.base import Candidate


def checkpoints_of(params: EarlyReject, max_tokens: int) -> list[int]:
    """Numbers of tokens at which candidates are judged."""
    if params.checkpoints is not None:
        return params.checkpoints
    return [at] if (at := max(1, 3 * max_tokens // 16)) < max_tokens else []


async def early_reject(run: PromptRun, params: EarlyReject) -> PromptResult:
    """The best of the candidates that were not stopped; those that were come last."""
    prompt_token_ids = await run.prompt_of_pieces()
    answers = [GrowingAnswer(run, index, prompt_token_ids) for index in range(run.num_candidates)]
    max_tokens = answers[0].max_new_tokens
    checkpoints = checkpoints_of(params, max_tokens)
    rivals = answers
    for checkpoint in checkpoints:
        rivals = await _grown(run, rivals, checkpoint)
        if all(answer.finish_reason is not None for answer in rivals):
            break  # nobody is left to be stopped
        rivals = await _survivors(run, params, rivals)
    rivals = await _grown(run, rivals, max_tokens)
    failed = {item.index for item in run.left_out}
    complete = [a.candidate() for a in answers if a.finish_reason is not None and a.index not in failed]
    stopped: list[tuple[Candidate, CandidateState]] = [
        (a.candidate(), "stopped") for a in answers if a.finish_reason is None and a.index not in failed
    ]
    result = PromptResult(ranked(await run.score(complete), stopped))
    result.piece_usages = run.piece_usages
    result.discarded_tokens = sum(a.discarded_tokens for a in answers)
    result.discarded_tokens += sum(len(a.token_ids) for a in answers if a.index in failed)
    result.outcome = {"checkpoints": checkpoints, "num_stopped": len(stopped)}
    return result


async def _grown(run: PromptRun, rivals: Sequence[GrowingAnswer], checkpoint: int) -> list[GrowingAnswer]:
    """All that are not left out, each with so many tokens or at its end."""
    unfinished = [answer for answer in rivals if answer.finish_reason is None]
    pieces = await run.generate_pieces(
        [(answer.index, answer.request(answer.index, checkpoint - len(answer.token_ids))) for answer in unfinished]
    )
    grown = {piece.index: piece for piece in pieces}
    for answer in unfinished:
        if answer.index in grown:
            await answer.extend(grown[answer.index])
    return [answer for answer in rivals if answer.index in grown or answer.finish_reason is not None]


async def _survivors(run: PromptRun, params: EarlyReject, rivals: Sequence[GrowingAnswer]) -> list[GrowingAnswer]:
    """The better ones by what they are so far.

    A candidate that has ended is judged whole. It stays a candidate when it is among the worst, but it does not take a
    place from those that go on.
    """
    texts = {answer.index: answer.text for answer in rivals}
    values = await run.judge_texts(rivals[0].prompt_token_ids, texts, reward=params.prefix_reward)
    num_kept = max(run.n, round(params.keep * len(values)))

    def worst_last(index: int) -> tuple[float, float, int]:
        return -(values[index].calibrated or 0.0), -values[index].raw, index

    kept = set(sorted(values, key=worst_last)[:num_kept])
    return [answer for answer in rivals if answer.index in kept]
