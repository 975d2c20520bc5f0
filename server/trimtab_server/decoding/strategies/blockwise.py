"""Blockwise best of K: the answer grows by blocks of tokens, each the best of N continuations of what there is.

Controlled decoding's blockwise procedure (arXiv 2310.17022).
"""

from collections.abc import Awaitable, Callable

from trimtab_adapters.contract.selection import Blockwise
from trimtab_server.decoding.candidates import ranked
from trimtab_server.decoding.growing import GrowingAnswer
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun
from trimtab_server.engine.base import EngineDelta

Emit = Callable[[EngineDelta], Awaitable[None]]
"""Takes each block as soon as it is chosen."""


async def blockwise(run: PromptRun, params: Blockwise, emit: Emit | None = None) -> PromptResult:
    """One answer; `emit` gets it piece by piece."""
    answer = GrowingAnswer(run, 0, await run.prompt_of_pieces())
    discarded_tokens = 0
    while answer.finish_reason is None:
        size = min(params.block_tokens, answer.max_new_tokens)
        blocks = await run.generate_pieces([(k, answer.request(k, size)) for k in range(run.num_candidates)])
        texts = {block.index: answer.with_piece(block).whole for block in blocks}
        values = await run.judge_texts(answer.prompt_token_ids, texts, reward=params.prefix_reward)
        run.check_enough(len(values))
        best = ranked([(block, values[block.index]) for block in blocks if block.index in values])[0].candidate
        discarded_tokens += sum(len(block.token_ids) for block in blocks if block is not best)
        await answer.extend(best)
        if emit is not None:
            await emit(answer.take_new())
    discarded_tokens += answer.discarded_tokens
    result = PromptResult(ranked(await run.score([answer.candidate()])), discarded_tokens=discarded_tokens)
    result.piece_usages = run.piece_usages
    result.outcome = {"num_blocks": answer.num_pieces, "discarded_tokens": discarded_tokens}
    return result
