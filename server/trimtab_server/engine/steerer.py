"""The seam between an engine without vLLM and the adapter LMs that steer it: no torch on this side.

The real one is `trimtab_adapters.in_process.stepper.Stepper`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from trimtab_adapters.contract.engine_api import LoadedVersion, RetireReply
from trimtab_adapters.contract.errors import AdapterMemoryFullError, EngineRequestError, RequestError, adapter_error
from trimtab_adapters.contract.params import SteeringParams, VersionId
from trimtab_adapters.contract.records import SteeringRecord
from trimtab_adapters.contract.sampling import SampledToken, SamplingRules, SteeringStatus, TopLogprobs

S = TypeVar("S")


class Steerer(Protocol[S]):
    """Runs adapter LMs and samples. S is its handle of one answer."""

    async def status(self) -> SteeringStatus:
        """What is loaded."""
        ...

    async def open(
        self,
        params: SteeringParams | None,
        prompt_token_ids: Sequence[int],
        rules: SamplingRules,
        *,
        num_begun: int = 0,
    ) -> S:
        """Begin an answer, steered by nothing without `params`; `close` it in the end. Raises `SteeringError`.

        The last `num_begun` ids of the prompt are the answer so far, which an encoder does not read.
        """
        ...

    async def step(self, session: S, top: TopLogprobs | None = None) -> SampledToken:
        """Steer the base's next-token distribution and sample the answer's next token.

        Args:
            session: The answer.
            top: What an API showed of that distribution; None when the base runs beside the adapter LMs.

        Raises:
            SteeringError: Steering failed; there is no token.
            EngineError: The base failed.
            EngineRequestError: The constraints of the request leave none of the tokens.
        """
        ...

    def close(self, session: S) -> None:
        """Let go of what an answer holds."""
        ...

    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """As `Engine.take_records`."""
        ...

    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """As `Engine.read_records`."""
        ...

    async def prepare(self, version: VersionId, path: str) -> LoadedVersion:
        """Load and validate a version; the state in which that ended."""
        ...

    async def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable. Raises `ConflictError` and `NotFoundError`."""
        ...

    async def retire(self, version: VersionId) -> RetireReply:
        """As `Engine.retire`."""
        ...

    def aclose(self) -> None:
        """End when the work under way is done."""
        ...


async def prepare_version(steerer: Steerer[S], version: VersionId, path: str) -> LoadedVersion:
    """As `Engine.prepare`. Raises `AdapterError`, or `AdapterMemoryFullError`."""
    loaded = await steerer.prepare(version, path)
    if loaded.state == "failed":
        message = loaded.error or f"version {version} could not be loaded"
        if loaded.error_code == AdapterMemoryFullError.default_code:
            raise AdapterMemoryFullError(message)
        raise adapter_error(message, loaded.error_code)
    return loaded


async def commit_version(steerer: Steerer[S], version: VersionId) -> LoadedVersion:
    """As `Engine.commit`."""
    try:
        return await steerer.commit(version)
    except RequestError as exc:
        raise EngineRequestError(exc.message, engine_status=exc.status) from exc
