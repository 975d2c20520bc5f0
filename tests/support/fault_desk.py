"""A desk at which requests are served by the V1 processor step by step, and every row is judged after each step."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from batch_runner import BatchRunner, RunnerRequest
from steering_reference import VOCAB_SIZE, Reference, params
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor
from trimtab_adapters.vllm.recording import RecordingSampler

TOLERANCE = 1e-4
"""Float32 sums in another order differ by a few 1e-6, a wrong token or position by far more."""


@dataclass(eq=False)
class Request(RunnerRequest):
    """One candidate with what it asked for: (version, alpha) terms."""

    uid: str = ""
    terms: list[tuple[str, float]] = field(default_factory=list)


class Desk:
    """Serves requests; `step` returns each request's error, None for a row that was steered exactly.

    A row that is steered but not exactly, a failed row whose logits are not the base's, and a row that is neither
    steered nor failed although it asked for steering are assertion errors.
    """

    def __init__(self, processor: SteeringProcessor, reference: Reference, names: dict[str, str]) -> None:
        self.processor, self.reference, self.names = processor, reference, names
        self.runner = BatchRunner()
        self.num_steps = 0
        processor.discarded = lambda num_rows: np.zeros(num_rows, np.bool_)

    @property
    def requests(self) -> list[Request]:
        return [request for request in self.runner.rows if isinstance(request, Request)]

    def admit(self, uid: str, prompt: list[int], *terms: tuple[str, float]) -> Request:
        """Put a request into the batch of the next step."""
        extra_args = dict(params(uid, *terms).to_xargs()) if terms else None
        sampling = SamplingParams(logprobs=0, extra_args=extra_args)
        request = Request(sampling, list(prompt), uid=uid, terms=list(terms))
        self.runner.add(request)
        return request

    def end(self, *requests: Request) -> None:
        """Take requests out of the batch and let the processor know, as in a step without `apply`."""
        for request in requests:
            self.runner.remove(request)
        self.runner.condense()
        self.processor.update_state(self.runner.take_update())

    def clear(self) -> None:
        """End everything; nothing may be held after it."""
        self.end(*self.requests)
        for resident in self.processor.residents.committed.values():
            assert resident.num_rows == 0
            assert resident.pool.num_used == 0

    def step(self) -> dict[str, str | None]:
        """One decoding step over all requests."""
        self.processor.update_state(self.runner.take_update())
        requests = self.requests
        base = torch.randn(len(requests), VOCAB_SIZE, generator=torch.Generator().manual_seed(self.num_steps))
        logits = self.processor.apply(base.clone())
        errors = self._judge(requests, base, logits)
        for request in requests:
            request.output_token_ids.append((7 * len(request.output_token_ids) + len(request.uid)) % 100 + 1)
        self.num_steps += 1
        return errors

    def _judge(self, requests: list[Request], base: Tensor, logits: Tensor) -> dict[str, str | None]:
        result = self.processor.result
        failed = {row.params.uid: row.error for row, _ in result.failed} if result is not None else {}
        steered = {row.params.uid for row in result.rows} if result is not None else set()
        errors: dict[str, str | None] = {}
        for index, request in enumerate(requests):
            want = base[index].clone()
            if request.uid in steered:
                tokens = request.prompt_token_ids + request.output_token_ids
                for version, alpha in request.terms:
                    want += alpha * self.reference.logprobs(self.names[version], tokens)
            else:
                assert not request.terms or request.uid in failed, f"{request.uid} was silently left unsteered"
            assert float((logits[index] - want).abs().max()) < TOLERANCE, f"{request.uid} is not exact"
            errors[request.uid] = failed.get(request.uid)
            assert request.uid not in failed or errors[request.uid], "a failed row says why"
        return errors


def greedy_metadata(
    processor: SteeringProcessor, *, num_logprobs: int = 0, token_ids: dict[int, list[int]] | None = None
) -> SamplingMetadata:
    """What vLLM's sampler is told of a batch of greedy rows."""
    none = torch.empty(0)
    return SamplingMetadata(
        max_num_logprobs=num_logprobs,
        generators={},
        logprob_token_ids=token_ids,
        all_greedy=True,
        all_random=False,
        temperature=None,
        top_p=None,
        top_k=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        output_token_ids=[],
        logitsprocs=LogitsProcessors([processor]),
    )


def sample(processor: SteeringProcessor, logits: Tensor) -> Any:
    """vLLM's own sampler, greedy, inside the recording one; returns its `SamplerOutput`."""
    return RecordingSampler(Sampler(), processor)(logits=logits, sampling_metadata=greedy_metadata(processor))
