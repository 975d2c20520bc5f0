"""The seam between a black-box engine and the adapter LMs that steer it: no torch on this side.

The real one is `trimtab_adapters.black_box.stepper.Stepper`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from trimtab_adapters.contract.black_box import SampledToken, SamplingRules, SteeringStatus, TopLogprobs
from trimtab_adapters.contract.engine_api import LoadedVersion, RetireReply
from trimtab_adapters.contract.params import SteeringParams, VersionId
from trimtab_adapters.contract.records import SteeringRecord

S = TypeVar("S")


class Steerer(Protocol[S]):
    """Runs adapter LMs and samples. S is its handle of one answer."""

    async def status(self) -> SteeringStatus:
        """What is loaded."""
        ...

    async def open(self, params: SteeringParams | None, prompt_token_ids: Sequence[int], rules: SamplingRules) -> S:
        """Begin an answer, steered by nothing without `params`; `close` it in the end. Raises `SteeringError`."""
        ...

    async def step(self, session: S, top: TopLogprobs) -> SampledToken:
        """Steer the base's next-token distribution and sample the answer's next token.

        Raises:
            SteeringError: Steering failed; there is no token.
            EngineRequestError: The constraints of the request leave none of the tokens shown.
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
