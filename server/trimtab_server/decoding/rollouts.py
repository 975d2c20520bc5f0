"""From a finished request to its rollouts: one per candidate, chosen or not, and one per reference rollout."""

from typing import Any

from trimtab_adapters.contract.params import SteeringOperators
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.reference_policy import ENDPOINT, NUM_LEFT_OUT, SELECTION
from trimtab_adapters.contract.selection import BestOfN, Blockwise
from trimtab_server.decoding.job import GenerationJob, JobResult
from trimtab_server.engine.base import Candidate

# In the request only for the gateway's own sake, or kept elsewhere in the rollout.
_NOT_SAMPLING = {"prompt", "messages", "return_token_ids", "logprobs", "top_logprobs"}


def rollouts_of(result: JobResult) -> list[Rollout]:
    """All rollouts of a request. Their ids are unique, so that writing them twice is harmless."""
    job, rollouts = result.job, []
    for prompt_index, prompt in enumerate(result.prompts):
        for selection in prompt.selections:
            rollout = _rollout(
                result,
                prompt_index,
                selection.candidate,
                choice_index=prompt_index * job.n + selection.rank if selection.rank < job.n else None,
                num_candidates=selection.num_candidates,
                reward=selection.reward,
            )
            if prompt.left_out:
                rollout.metadata[NUM_LEFT_OUT] = len(prompt.left_out)
            rollouts.append(rollout)
        for candidate in prompt.references:
            rollouts.append(_reference(result, prompt_index, candidate, len(prompt.references)))
    return rollouts


def _rollout(
    result: JobResult,
    prompt_index: int,
    candidate: Candidate,
    *,
    choice_index: int | None,
    num_candidates: int,
    reward: RewardValue | None,
) -> Rollout:
    job = result.job
    # A candidate that was only explained has a record, in which nothing differs from the base.
    record = candidate.record if candidate.is_steered else None
    rollout = _base(result, prompt_index, candidate, job.request(prompt_index, candidate.index).body)
    sampling = {**rollout.sampling}
    if job.operators != SteeringOperators():
        sampling["steering_operators"] = job.operators.model_dump(exclude_none=True)
    if job.active_guidance is not None:
        sampling["guidance"] = job.active_guidance.model_dump()
    if isinstance(job.selection, Blockwise):
        sampling["selection"] = job.selection.model_dump(exclude_none=True, exclude={"return_candidates", "stream"})
    elif job.selection is not None and not isinstance(job.selection, BestOfN):
        rollout.metadata[SELECTION] = job.selection.strategy
    return rollout.model_copy(
        update={
            "id": f"{job.id}-{prompt_index}-{candidate.index}",
            "endpoint": job.endpoint,
            "steering": list(job.resolved.steering),
            "base_logprobs": record.base_logprobs if record else None if job.is_steered else candidate.token_logprobs,
            "adapter_logprobs": record.adapter_logprobs if record else None,
            "steered_logprobs": record.steered_logprobs if record else candidate.token_logprobs,
            "kl": record.kl if record else None,
            "flipped": record.flipped if record else None,
            "sampling": sampling,
            "num_candidates": num_candidates,
            "chosen": choice_index is not None,
            "choice_index": choice_index,
            "rewards": [reward] if reward is not None else [],
        }
    )


def _reference(result: JobResult, prompt_index: int, candidate: Candidate, num_drawn: int) -> Rollout:
    body = result.job.reference_request(prompt_index, candidate.index).body
    rollout = _base(result, prompt_index, candidate, body)
    metadata = {**rollout.metadata, ENDPOINT: result.job.endpoint}
    return rollout.model_copy(update={"num_candidates": num_drawn, "chosen": False, "metadata": metadata})


def _base(result: JobResult, prompt_index: int, candidate: Candidate, body: dict[str, Any]) -> Rollout:
    """An unsteered rollout; its base and steered log-probabilities are the same."""
    job: GenerationJob = result.job
    restriction = candidate.choice.get("black_box")
    return Rollout(
        id=f"{job.id}-{prompt_index}-ref-{candidate.index}",
        request_id=job.id,
        created_at=result.completed_at,
        duration_s=candidate.duration_s,
        route=job.resolved.model,
        base_model=job.resolved.base_model,
        endpoint="reference",
        prompt=job.prompts[prompt_index].text,
        prompt_token_ids=candidate.prompt_token_ids,
        output_text=candidate.text,
        output_token_ids=candidate.token_ids,
        steering=[],
        base_logprobs=candidate.token_logprobs,
        steered_logprobs=candidate.token_logprobs,
        sampling={key: value for key, value in body.items() if key not in _NOT_SAMPLING}
        | ({} if restriction is None else {"black_box": restriction}),
        candidate_index=candidate.index,
        finish_reason=candidate.finish_reason,
        metadata={**job.metadata, "prompt_index": prompt_index, "engine": candidate.engine},
    )
