"""How answers say why a choice was chosen, and what became of the other candidates."""

from typing import Any

from trimtab_adapters.contract.selection import SelectionRequest
from trimtab_server.decoding.candidates import LeftOut, Selection
from trimtab_server.decoding.job import PromptResult
from trimtab_server.errors import error_answer


def selection_object(request: SelectionRequest, selection: Selection, prompt: PromptResult) -> dict[str, Any]:
    """Why a choice was chosen: its reward and rank, and what the strategy did for its prompt."""
    left_out = [_left_out(item) for item in prompt.left_out]
    return {
        "strategy": request.strategy,
        **_standing(selection),
        **prompt.outcome,
        **({"left_out": left_out} if left_out else {}),
    }


def candidate_object(selection: Selection, n: int) -> dict[str, Any]:
    """What became of a candidate: `chosen`, `not_chosen`, `stopped` before its end, or `late`."""
    state: str = selection.state
    if state == "complete":
        state = "chosen" if selection.rank < n else "not_chosen"
    return {"state": state, **_standing(selection)}


def _left_out(item: LeftOut) -> dict[str, Any]:
    """A candidate that failed, as the error would have been told."""
    return {"index": item.index, "error": error_answer(item.error).error}


def _standing(selection: Selection) -> dict[str, Any]:
    candidate = selection.candidate
    return {
        "reward": selection.reward.model_dump() if selection.reward is not None else None,
        "mean_logprob": candidate.mean_logprob if candidate.token_logprobs else None,
        "rank": selection.rank,
        "num_candidates": selection.num_candidates,
    }
