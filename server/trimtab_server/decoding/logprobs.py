"""The engine's record of a steering, checked against the answer, and how callers see it."""

from collections.abc import Sequence
from typing import Any

from trimtab_adapters.contract.errors import SteeringError
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_server.engine.base import Candidate


def checked_record(
    candidate: Candidate, record: SteeringRecord | None, num_tokens: int | None = None
) -> SteeringRecord:
    """The record of a candidate that was steered or explained, cut to its tokens, or to the first `num_tokens` of them.

    The engine may have sampled a few tokens more than the answer shows, when a stop string ended it. It can never have
    steered fewer, or others.

    Raises:
        SteeringError: There is no record, it says that steering failed, or it is not of these tokens.
    """
    uid = candidate.steering.uid if candidate.steering is not None else ""
    return cut_record(uid, candidate.token_ids[:num_tokens], record)


def cut_record(uid: str, token_ids: Sequence[int], record: SteeringRecord | None) -> SteeringRecord:
    """What a record says of these tokens, the first that it may be of. Raises as `checked_record`."""
    if record is None:
        raise SteeringError(f"The engine has no record of the steering of candidate {uid}; its answer is withheld.")
    if record.status == "failed":
        raise SteeringError(f"Steering of this request failed: {record.error or 'the engine did not say why'}")
    n = len(token_ids)
    if record.num_tokens < n or record.token_ids[:n] != token_ids:
        raise SteeringError(f"The engine's record is not that of candidate {uid}; its answer is withheld.")
    return record.model_copy(
        update={
            "num_tokens": n,
            "token_ids": record.token_ids[:n],
            "base_logprobs": record.base_logprobs[:n],
            "adapter_logprobs": [values[:n] for values in record.adapter_logprobs],
            "negative_logprobs": None if record.negative_logprobs is None else record.negative_logprobs[:n],
            "steered_logprobs": record.steered_logprobs[:n],
            "kl": record.kl[:n],
            "flipped": record.flipped[:n],
            "alternatives": None if record.alternatives is None else record.alternatives[:n],
        }
    )


def joined_records(uid: str, records: Sequence[SteeringRecord]) -> SteeringRecord:
    """One record of pieces that follow each other, all steered alike. At least one."""
    first = records[0]

    def joined(name: str) -> list[Any] | None:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else [value for part in parts for value in part]

    return first.model_copy(
        update={
            "uid": uid,
            "num_tokens": sum(record.num_tokens for record in records),
            "adapter_logprobs": [
                [value for record in records for value in record.adapter_logprobs[i]]
                for i in range(len(first.adapter_logprobs))
            ],
            **{
                name: joined(name)
                for name in (
                    *("token_ids", "base_logprobs", "negative_logprobs", "steered_logprobs"),
                    *("kl", "flipped", "alternatives"),
                )
            },
        }
    )


def steering_logprobs(candidate: Candidate) -> dict[str, Any]:
    """What `steering_logprobs: true` adds to a choice: per generated token, natural logarithms before temperature.

    `adapter` has one list per adapter with a non-zero alpha, None at tokens where the schedule kept it from running;
    `negative` is there with a negative prompt. Of an unsteered candidate base and steered are the same.
    """
    record = candidate.record
    if record is None:
        n = len(candidate.token_ids)
        return {
            "token_ids": candidate.token_ids,
            "base": candidate.token_logprobs,
            "adapter": [],
            "steered": candidate.token_logprobs,
            "kl": [0.0] * n,
            "flipped": [False] * n,
        }
    negative = {} if record.negative_logprobs is None else {"negative": record.negative_logprobs}
    return {
        "token_ids": record.token_ids,
        "base": record.base_logprobs,
        "adapter": record.adapter_logprobs,
        **negative,
        "steered": record.steered_logprobs,
        "kl": record.kl,
        "flipped": record.flipped,
    }
