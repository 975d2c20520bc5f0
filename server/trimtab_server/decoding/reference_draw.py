"""Draws from the reference policy: the base model without steering."""

from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_server.decoding.fanout import generate_all
from trimtab_server.decoding.job import GenerationJob
from trimtab_server.engine.base import Candidate, Engine


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
        """The `ReferencePolicy` of the job, whatever its steering: its base model at its sampling settings."""
        return ReferencePolicy.of(self._job.resolved.base_model, self._job.endpoint, self._job.body).key

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
