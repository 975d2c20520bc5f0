"""How answers say why a choice was chosen, and what became of the other candidates."""

from typing import Any

from trimtab_adapters.contract.selection import SelectionRequest
from trimtab_server.decoding.candidates import Selection


def selection_object(request: SelectionRequest, selection: Selection, outcome: dict[str, Any]) -> dict[str, Any]:
    """Why a choice was chosen: its reward and rank, and what the strategy did for its prompt."""
    return {"strategy": request.strategy, **_standing(selection), **outcome}


def candidate_object(selection: Selection, n: int) -> dict[str, Any]:
    """What became of a candidate: `chosen`, `not_chosen`, `stopped` before its end, or `late`."""
    state: str = selection.state
    if state == "complete":
        state = "chosen" if selection.rank < n else "not_chosen"
    return {"state": state, **_standing(selection)}


def _standing(selection: Selection) -> dict[str, Any]:
    candidate = selection.candidate
    return {
        "reward": selection.reward.model_dump() if selection.reward is not None else None,
        "mean_logprob": candidate.mean_logprob if candidate.token_logprobs else None,
        "rank": selection.rank,
        "num_candidates": selection.num_candidates,
    }
