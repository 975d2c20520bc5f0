"""What each model thought of every token: the engine's record in the form that callers get."""

import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from trimtab_adapters.contract.errors import SteeringError
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import Alternative, SteeringRecord
from trimtab_server.decoding.job import GenerationJob
from trimtab_server.decoding.logprobs import cut_record
from trimtab_server.decoding.token_texts import TokenTexts
from trimtab_server.engine.base import Candidate, Engine, EngineDelta, EngineRequest


@dataclass(frozen=True, slots=True)
class ExplainedDelta:
    """A piece of a streamed candidate, and what the caller is told about its tokens where that was asked for."""

    delta: EngineDelta
    explanation: dict[str, Any] | None = None


class Explainer:
    """Explains candidates whose engine requests asked for alternatives.

    Args:
        engine: Where the candidates are generated.
        texts: Texts of the alternatives.
    """

    def __init__(self, engine: Engine, texts: TokenTexts) -> None:
        self._engine = engine
        self._texts = texts

    async def explain(self, job: GenerationJob, candidates: Iterable[Candidate]) -> None:
        """Set `explanation` of candidates whose records have been taken and checked."""
        recorded = [(candidate, candidate.record) for candidate in candidates if candidate.record is not None]
        texts = await self._texts_of(job, [record for _, record in recorded])
        for candidate, record in recorded:
            shown = shown_tokens(candidate.choice, record.token_ids, texts)
            candidate.explanation = explanation(record, job.active_adapters, shown, texts)

    async def stream(self, job: GenerationJob, request: EngineRequest) -> AsyncGenerator[ExplainedDelta, None]:
        """The engine's stream of a candidate, each piece with the explanation of exactly its tokens.

        Raises:
            SteeringError: The engine's record is missing, says that steering failed, or is not of these tokens.
            EngineError: What `Engine.stream` and `Engine.read_records` raise.
        """
        num_known = 0
        async with aclosing(cast("AsyncGenerator[EngineDelta, None]", self._engine.stream(request))) as deltas:
            async for delta in deltas:
                steering = request.steering
                if steering is None or not (job.explains and delta.token_ids):
                    yield ExplainedDelta(delta)
                    continue
                # Read here, where all candidates wait at the same time, so that they share a request to the engine.
                records = await self._engine.read_records({steering.uid: num_known})
                record = cut_record(steering.uid, delta.token_ids, records.get(steering.uid))
                num_known += len(delta.token_ids)
                texts = await self._texts_of(job, [record])
                shown = shown_tokens(delta.choice, record.token_ids, texts)
                yield ExplainedDelta(delta, explanation(record, job.active_adapters, shown, texts))

    async def _texts_of(self, job: GenerationJob, records: Sequence[SteeringRecord]) -> Mapping[int, str]:
        """Texts of all tokens and alternatives; where the caller wants ids for texts, in the engine's form of these."""
        token_ids = {token_id for record in records for token_id in record.token_ids}
        for record in records:
            for at in record.alternatives or ():
                token_ids.update(alternative.token_id for alternative in (*at.before, *at.after))
        if job.body.get("return_tokens_as_token_ids"):
            return {token_id: f"token_id:{token_id}" for token_id in token_ids}
        return await self._texts.of(token_ids)


def explanation(
    record: SteeringRecord, adapters: Sequence[AdapterWeight], shown: Sequence[str], texts: Mapping[int, str]
) -> dict[str, Any]:
    """`{"tokens": [...]}`: one object per token of the record; None stands for minus infinity.

    Args:
        record: With one entry per token in every list.
        adapters: Those that the record is of, in its order.
        shown: Text of each token as in the answer.
        texts: Texts of the alternatives.

    Raises:
        SteeringError: The record has no alternatives, or not of every adapter.
    """
    n = len(record.token_ids)
    if n and (record.alternatives is None or len(record.alternatives) != n):
        raise SteeringError(f"The engine did not explain the tokens of candidate {record.uid}.")
    if n and len(record.adapter_logprobs) != len(adapters):
        raise SteeringError(f"The engine's record is not of the adapters of candidate {record.uid}.")
    tokens = []
    for i in range(n):
        negative = {} if record.negative_logprobs is None else {"negative": _finite(record.negative_logprobs[i])}
        at = (record.alternatives or [])[i]
        tokens.append(
            {
                "token_id": record.token_ids[i],
                "token": shown[i],
                "base": _finite(record.base_logprobs[i]),
                "adapters": [
                    {"name": weight.name, "version": weight.version, "logprob": _finite(values[i])}
                    for weight, values in zip(adapters, record.adapter_logprobs, strict=True)
                ],
                **negative,
                "steered": _finite(record.steered_logprobs[i]),
                "kl": record.kl[i],
                "flipped": record.flipped[i],
                "before": [_alternative(alternative, texts) for alternative in at.before],
                "after": [_alternative(alternative, texts) for alternative in at.after],
            }
        )
    return {"tokens": tokens}


def shown_tokens(choice: Mapping[str, Any], token_ids: Sequence[int], texts: Mapping[int, str]) -> list[str]:
    """The texts of the tokens as the log-probabilities of the answer show them; else each token's own."""
    logprobs = choice.get("logprobs") or {}
    shown = logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content") or []]
    if len(shown) < len(token_ids):
        return [texts[token_id] for token_id in token_ids]
    return list(shown[len(shown) - len(token_ids) :])  # those of an echoed prompt come first


def _alternative(alternative: Alternative, texts: Mapping[int, str]) -> dict[str, Any]:
    return {
        "token_id": alternative.token_id,
        "token": texts[alternative.token_id],
        "base": _finite(alternative.base),
        "steered": _finite(alternative.steered),
    }


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is not None and math.isfinite(logprob) else None
