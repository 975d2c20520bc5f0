"""Draws from the reference policy: the base model without steering."""

import hashlib
import json

from trimtab_server.decoding.fanout import generate_all
from trimtab_server.decoding.job import GenerationJob
from trimtab_server.engine.base import Candidate, Engine

NOT_SAMPLING = {
    "logprobs",
    "top_logprobs",
    "return_token_ids",
    "prompt_logprobs",
    "echo",
    "stream_interval",
    "priority",
}
"""Fields of an engine's request that do not change the distribution of the text."""


class BaseReferenceDraw:
    """`ReferenceDraw` for one prompt of a job. Keeps what it drew, for usage and the rollout log."""

    def __init__(self, engine: Engine, job: GenerationJob, prompt_index: int) -> None:
        self._engine = engine
        self._job = job
        self._prompt_index = prompt_index
        self._num_requested = 0
        self.drawn: list[Candidate] = []

    @property
    def key(self) -> str:
        """Base model, `unsteered`, and a hash of the sampling settings without the seed."""
        job = self._job
        sampling = {key: value for key, value in job.body.items() if key not in NOT_SAMPLING}
        text = json.dumps([job.endpoint, sampling], sort_keys=True)
        return f"{job.resolved.base_model}/unsteered/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    async def __call__(self, num: int) -> list[Candidate]:
        """Draw `num` unsteered candidates of the prompt."""
        start = self._num_requested
        self._num_requested += num
        requests = [self._job.reference_request(self._prompt_index, start + i) for i in range(num)]
        candidates = await generate_all(self._engine, requests)
        for i, candidate in enumerate(candidates):
            candidate.index = start + i
        self.drawn.extend(candidates)
        return candidates
