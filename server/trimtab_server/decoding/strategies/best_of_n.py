"""Best of N: all candidates are generated, the best are chosen. Also with a random N (best-of-Poisson)."""

import math
from random import Random

from trimtab_adapters.contract.selection import BestOfN, Poisson
from trimtab_server.decoding.candidates import ranked
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun


async def best_of_n(run: PromptRun, params: BestOfN) -> PromptResult:
    """All N candidates, best first."""
    return await _best_of(run, run.num_candidates)


async def poisson(run: PromptRun, params: Poisson) -> PromptResult:
    """The best of 1 + Poisson(mean) candidates, at least as many as there are choices and at most N."""
    drawn = 1 + _poisson(run.dice("poisson"), params.mean)
    result = await _best_of(run, max(run.n, min(drawn, run.num_candidates)))
    result.outcome = {"mean": params.mean, "is_capped": drawn > run.num_candidates}
    return result


async def _best_of(run: PromptRun, num: int) -> PromptResult:
    candidates = await run.generate(range(num))
    return PromptResult(ranked(await run.score(candidates)))


def _poisson(dice: Random, mean: float) -> int:
    """A Poisson number: how many unit-rate events happen before time `mean`."""
    count, time = 0, -math.log(1 - dice.random())
    while time < mean:
        count += 1
        time -= math.log(1 - dice.random())
    return count
