"""How a request's choices are found: what its fields, and those of its route, mean together."""

from typing import Any, cast

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import RewardChoice, RewardMix
from trimtab_adapters.contract.selection import (
    DEFAULT_CAP,
    Adaptive,
    BestOfN,
    Blockwise,
    EarlyReject,
    Rejection,
    SelectionRequest,
    SelectionStrategy,
)
from trimtab_server.api.request_fields import GenerationBody
from trimtab_server.decoding.job import CHAT_RENDERING, PIECE_FIELDS, GenerationJob
from trimtab_server.decoding.strategies.threshold import threshold_of
from trimtab_server.storage.base import ResolvedModel

_HARMLESS_IN_PIECES = {
    *("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
    *("return_token_ids", "add_special_tokens", "stream_interval"),
}


_NOTHING = (None, False, 0, 0.0, {"type": "text"})
"""Values with which a field asks for nothing; the last is `response_format`'s."""


def num_candidates_of(body: GenerationBody, resolved: ResolvedModel) -> int:
    """Candidates per prompt, or the most there may be.

    Raises:
        InvalidRequestError: Fewer than choices.
    """
    if body.best_of is not None and body.best_of < body.n:
        raise InvalidRequestError(
            "You requested that the server return more choices than it will generate (HINT: you must set 'n' "
            f"(currently {body.n}) to be at most 'best_of' (currently {body.best_of}), or omit either parameter if "
            "you don't specifically want to use them.)",
            param="best_of",
        )
    if body.best_of is not None:
        return body.best_of
    default = DEFAULT_CAP if body.selection is not None and body.selection.has_own_cap else 1
    return max(body.n, resolved.best_of or default)


def selection_of(
    body: GenerationBody, resolved: ResolvedModel, num_candidates: int, reward: RewardChoice | None
) -> SelectionRequest | None:
    """The strategy; None where every candidate is a choice.

    Raises:
        InvalidRequestError: The strategy lacks something, or cannot be streamed.
    """
    given = body.selection
    if given is not None:
        _check_given(given, body, num_candidates, reward)
    if body.stream and not isinstance(given, Blockwise) and (given is None or given.stream is None):
        _check_stream(body, resolved, num_candidates)
        return None
    if given is not None:
        return cast(SelectionRequest, given)
    asks_best_of = body.best_of is not None or resolved.best_of is not None
    return BestOfN() if reward is not None or (asks_best_of and num_candidates > 1) else None


def check_selection(job: GenerationJob) -> None:
    """What a strategy cannot do with the other fields of the request.

    Raises:
        InvalidRequestError: It is asked to.
    """
    selection = job.selection
    if isinstance(job.reward, RewardMix) and not job.calibrates:
        raise InvalidRequestError(
            "Several rewards can only be combined when they are calibrated: raw rewards have no common scale.",
            param="calibration",
        )
    if isinstance(selection, Adaptive | Rejection | Blockwise) and job.calibration.method == "leave_one_out":
        raise InvalidRequestError(
            f"The strategy {selection.strategy!r} does not have all candidates at once, so they cannot be ranked among "
            "each other. Use 'reference' or 'pooled'.",
            param="calibration.method",
        )
    if isinstance(selection, SelectionStrategy) and selection.needs_calibration and not job.calibrates:
        raise InvalidRequestError(
            f"The strategy {selection.strategy!r} needs calibrated rewards; 'calibration.size' must not be 0.",
            param="calibration",
        )
    match selection:
        case Adaptive():
            try:
                threshold_of(selection, job.num_candidates, job.num_rollouts)
            except ValueError as exc:
                raise InvalidRequestError(f"Invalid 'selection': {exc}.", param="selection.target") from exc
        case EarlyReject(checkpoints=checkpoints):
            _check_pieces(job, selection.strategy)
            if checkpoints is not None and checkpoints[-1] >= (job.max_tokens or 0):
                raise InvalidRequestError(
                    f"Invalid 'selection.checkpoints': {checkpoints[-1]} is not before the end of {job.max_tokens} "
                    "tokens.",
                    param="selection.checkpoints",
                )
        case Blockwise():
            if len(job.prompts) > 1:
                raise InvalidRequestError("The strategy 'blockwise' takes one prompt.", param="prompt")
            _check_pieces(job, selection.strategy)
        case _:
            pass


def _check_given(
    selection: SelectionStrategy, body: GenerationBody, num_candidates: int, reward: RewardChoice | None
) -> None:
    name: Any = getattr(selection, "strategy", None)
    if selection.needs_reward and reward is None:
        raise InvalidRequestError(f"The strategy {name!r} needs a 'reward'.", param="reward")
    if selection.needs_more_than_choices and num_candidates <= body.n:
        raise InvalidRequestError(
            f"The strategy {name!r} needs more candidates than choices: set 'best_of' above {body.n}.", param="best_of"
        )
    if selection.max_choices is not None and body.n > selection.max_choices:
        raise InvalidRequestError(f"The strategy {name!r} gives one choice; 'n' must be 1.", param="n")
    if selection.stream is not None and not body.stream:
        raise InvalidRequestError("'selection.stream' needs 'stream': true.", param="selection.stream")


def _check_stream(body: GenerationBody, resolved: ResolvedModel, num_candidates: int) -> None:
    hint = "Set 'selection.stream' to \"buffered\" to get the choices in chunks once they are chosen."
    if body.selection is not None or body.reward is not None:
        field = "selection" if body.selection is not None else "reward"
        raise InvalidRequestError(
            f"Results cannot be streamed with '{field}': choices are only known when whole answers are. {hint}",
            param="stream",
        )
    if num_candidates > body.n:
        source = "best_of" if body.best_of is not None else f"the route {resolved.model!r}, whose best_of"
        raise InvalidRequestError(
            f"Results cannot be streamed when more candidates are generated than returned: {source} is "
            f"{num_candidates} and n is {body.n}. Set 'best_of' to {body.n} to stream. {hint}",
            param="stream",
        )


def _check_pieces(job: GenerationJob, strategy: str) -> None:
    """Answers that are generated piece by piece cannot have what counts or parses over the whole answer."""
    if job.max_tokens is None:
        raise InvalidRequestError(f"The strategy {strategy!r} needs 'max_tokens'.", param="max_tokens")
    known = PIECE_FIELDS | _HARMLESS_IN_PIECES | (CHAT_RENDERING if job.endpoint == "chat.completions" else set())
    unknown = sorted(name for name in job.body.keys() - known if job.body[name] not in _NOTHING)
    if unknown:
        raise InvalidRequestError(
            f"'{unknown[0]}' does not go together with the strategy {strategy!r}, which generates answers in pieces.",
            param=unknown[0],
            code="unsupported_parameter",
        )
    if job.operators.schedule is not None:
        raise InvalidRequestError(
            f"'steering.schedule' does not go together with the strategy {strategy!r}, which generates in pieces.",
            param="steering.schedule",
        )
