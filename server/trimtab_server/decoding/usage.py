"""Token accounting of a whole request, by OpenAI's rules.

`completion_tokens` counts every candidate, chosen or not, and what was generated of those that were stopped;
`prompt_tokens` counts each prompt once.
Reference rollouts drawn to calibrate a reward were not asked for as an answer, so their generated tokens stand apart
in `reference_tokens`, which is there only when some were drawn.
With a black-box base `black_box` is what its provider billed: other numbers, because each token is a call that sends
the prompt again. It counts everything, references included; calls that failed cannot be told.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from trimtab_server.decoding.job import PromptResult
from trimtab_server.engine.base import Candidate


def total_usage(prompts: Sequence[PromptResult]) -> dict[str, Any]:
    """OpenAI's usage object for all prompts of a request."""
    candidates = [candidate for prompt in prompts for candidate in prompt.candidates]
    firsts = [prompt.candidates[0] for prompt in prompts if prompt.candidates]
    discarded = sum(prompt.discarded_tokens for prompt in prompts)
    usage = plain_usage(_sum(firsts, "prompt_tokens"), _sum(candidates, "completion_tokens") + discarded)
    if (cached := _details(firsts, "prompt_tokens_details", "cached_tokens")) is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    if (reasoning := _details(candidates, "completion_tokens_details", "reasoning_tokens")) is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    if references := [candidate for prompt in prompts for candidate in prompt.references]:
        usage["reference_tokens"] = _sum(references, "completion_tokens")
    billed = [candidate.usage.get("black_box") for prompt in prompts for candidate in prompt.candidates]
    billed += [candidate.usage.get("black_box") for prompt in prompts for candidate in prompt.references]
    billed += [piece.get("black_box") for prompt in prompts for piece in prompt.piece_usages]
    if known := [cost for cost in billed if cost is not None]:
        usage["black_box"] = {name: sum(int(cost[name]) for cost in known) for name in known[0]}
    return usage


def plain_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The three numbers that are always there."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _sum(candidates: Iterable[Candidate], key: str) -> int:
    return sum(int(candidate.usage.get(key) or 0) for candidate in candidates)


def _details(candidates: Iterable[Candidate], group: str, key: str) -> int | None:
    values = [(candidate.usage.get(group) or {}).get(key) for candidate in candidates]
    known = [int(value) for value in values if value is not None]
    return sum(known) if known else None
