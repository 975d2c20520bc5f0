"""From a valid body and a resolved model to a job: how many candidates, ranked by what, logged or not."""

import uuid
from dataclasses import asdict, replace
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import Guidance
from trimtab_adapters.contract.records import X_REQUEST_ID
from trimtab_server.api.calibration_field import CalibrationField
from trimtab_server.api.chat_request import ChatBody
from trimtab_server.api.request_fields import GenerationBody
from trimtab_server.api.selecting import check_selection, num_candidates_of, selection_of
from trimtab_server.decoding.job import GenerationJob
from trimtab_server.decoding.reference import DEFAULT_SIZE
from trimtab_server.engine.base import Endpoint
from trimtab_server.storage.base import ResolvedModel

MAX_CANDIDATES = 16384
"""Most candidates of one request, over all its prompts."""


def build_job(
    body: GenerationBody,
    resolved: ResolvedModel,
    *,
    endpoint: Endpoint,
    is_logging: bool,
    metadata: dict[str, Any],
    guidance: Guidance | None = None,
    calibration_size: int = DEFAULT_SIZE,
) -> GenerationJob:
    """The job of a request. A route's own `best_of` and reward hold where the body does not say.

    Args:
        body: The request's.
        resolved: What its `model` and `steering` mean.
        endpoint: The engine's route.
        is_logging: Whether rollouts are logged.
        metadata: For the rollouts.
        guidance: The resolved negative prompt.
        calibration_size: Reference rollouts where the body does not say.

    Raises:
        InvalidRequestError: The fields do not go together, or not with the route.
    """
    num_candidates = num_candidates_of(body, resolved)
    # A route's reward is for choosing; where there is nothing to choose, it is not worth its time.
    reward = body.reward or (resolved.reward if num_candidates > body.n else None)
    selection = selection_of(body, resolved, num_candidates, reward)
    if body.calibration is not None and reward is None:
        raise InvalidRequestError("'calibration' needs a 'reward' to calibrate.", param="calibration")
    prompts = body.prompts()
    if len(prompts) * num_candidates > MAX_CANDIDATES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with {num_candidates} candidates each are more than the {MAX_CANDIDATES} "
            "candidates that one request may ask for.",
            param="prompt",
        )
    num_alternatives = body.steering.num_alternatives if body.steering is not None else None
    prefix = "cmpl" if endpoint == "completions" else "chatcmpl"
    job = GenerationJob(
        id=f"{prefix}-{uuid.uuid4().hex}",
        endpoint=endpoint,
        resolved=resolved,
        prompts=prompts,
        body=body.engine_fields(),
        seed=body.seed,
        n=body.n,
        num_candidates=num_candidates,
        selection=selection,
        reward=reward if selection is not None else None,
        record=is_logging or body.steering_logprobs or num_alternatives is not None,
        steering_logprobs=body.steering_logprobs,
        guidance=guidance,
        num_alternatives=num_alternatives,
        metadata=metadata,
    )
    choice = (body.calibration or CalibrationField()).choice(is_steered=job.is_steered, num_candidates=num_candidates)
    if choice.effective_method == "reference" and choice.size is None:
        choice = replace(choice, size=calibration_size)
    job = replace(job, calibration=choice)
    _check_steering(job, body)
    if body.calibration is not None:
        choice = body.calibration.choice(is_steered=job.is_steered, num_candidates=num_candidates)
        job = replace(job, calibration=choice)
    check_selection(job)
    return job


def rollout_metadata(request: Request, body: GenerationBody, resolved: ResolvedModel) -> dict[str, Any]:
    """What the caller said about the request, and on which side of a canary it is, for its rollouts."""
    metadata: dict[str, Any] = {}
    if resolved.canary is not None:
        metadata["canary"] = asdict(resolved.canary)
    if body.user is not None:
        metadata["user"] = body.user
    if request.state.has_caller_request_id:
        metadata[X_REQUEST_ID] = request.state.request_id
    if isinstance(body, ChatBody) and body.metadata:
        metadata["metadata"] = body.metadata
    return metadata


def _check_steering(job: GenerationJob, body: GenerationBody) -> None:
    if not job.is_steered:
        return
    try:
        job.steering(job.id)
    except ValidationError as exc:
        raise InvalidRequestError(f"Invalid 'steering': {exc.errors()[0]['msg']}.", param="steering") from exc
    if isinstance(body, ChatBody) and body.has_media:
        raise InvalidRequestError(
            "Messages with images, audio or other media cannot be steered: the adapter LM only reads text.",
            param="messages",
        )
