"""How choices are found among the candidates of a prompt: one file a strategy, all behind `select`."""

import asyncio

from trimtab_adapters.contract.selection import Adaptive, BestOfN, Blockwise, EarlyReject, Poisson, Rejection, Soft
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.decoding.strategies.adaptive import adaptive
from trimtab_server.decoding.strategies.best_of_n import best_of_n, poisson
from trimtab_server.decoding.strategies.blockwise import Emit, blockwise
from trimtab_server.decoding.strategies.early_reject import early_reject
from trimtab_server.decoding.strategies.tilted import rejection, soft

__all__ = ["Emit", "select"]


async def select(run: PromptRun, emit: Emit | None = None) -> PromptResult:
    """The candidates of one prompt by the strategy that its request names.

    Args:
        run: The prompt.
        emit: Takes the pieces of an answer that is decided piece by piece.

    Raises:
        EngineError, SteeringError, RewardError: A candidate failed and could not be left out.
    """
    preparing = asyncio.create_task(run.prepare())
    try:
        result = await _selected(run, emit)
    finally:
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)  # scoring has met its error, if it matters
    run.check_enough(sum(selection.state == "complete" for selection in result.selections))
    result.references = run.draw.drawn
    result.left_out = run.left_out
    return result


async def _selected(run: PromptRun, emit: Emit | None) -> PromptResult:
    match run.job.selection:
        case Adaptive() as params:
            result = await adaptive(run, params)
        case EarlyReject() as params:
            result = await early_reject(run, params)
        case Blockwise() as params:
            result = await blockwise(run, params, emit)
        case Soft() as params:
            result = await soft(run, params)
        case Rejection() as params:
            result = await rejection(run, params)
        case Poisson() as params:
            result = await poisson(run, params)
        case BestOfN() as params:
            result = await best_of_n(run, params)
        case None:
            raise ValueError("this request selects nothing")
    return result
