"""The seam to an engine: what the gateway asks of one, and what comes back.

Implementations: `vllm_http.VllmEngine` (a stock vLLM server with Trimtab's plug-ins), `black_box.BlackBoxEngine` (a
base behind somebody else's API), `transformers_engine.TransformersEngine` (a base in this process) and
`fake.FakeEngine` (deterministic, for unit tests and client examples).

The gateway fans `n`, `best_of` and lists of prompts out itself, so an engine request always is one prompt and one
candidate.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trimtab_adapters.contract.engine_api import EngineStatus, LoadedVersion, RetireReply
from trimtab_adapters.contract.params import SteeringParams, VersionId
from trimtab_adapters.contract.records import SteeringRecord

Endpoint = Literal["completions", "chat.completions"]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy to vLLM, which refuses more than one greedy choice of a request."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One candidate to generate.

    Attributes:
        endpoint: Which of the engine's OpenAI routes to use.
        body: The engine's request body without `model`, `n`, `stream` and `stream_options`; validated and translated
            by the gateway. Always asks for `logprobs` >= 0 and `return_token_ids`. `vllm_xargs` are the caller's own;
            the engine adds the steering to them.
        steering: None for a candidate that is neither steered nor explained.
        request_id: For the engine's log and traces; unique per candidate.
        num_begun: Of the ids of a completion's prompt, how many at the end are the answer so far. Only a base whose
            encoder reads prompts has to know.
    """

    endpoint: Endpoint
    body: dict[str, Any]
    steering: SteeringParams | None
    request_id: str
    num_begun: int = 0

    def is_next_of(self, other: "EngineRequest") -> bool:
        """Whether this is what comes after another in a group: nothing is steered, and only the seed is one larger."""
        if self.steering is not None or other.steering is not None or self.endpoint != other.endpoint:
            return False
        temperature = self.body.get("temperature")
        if self.body.get("use_beam_search") or (temperature is not None and temperature < GREEDY_BELOW):
            return False
        seed = other.body.get("seed")
        return self.body == (other.body if seed is None else {**other.body, "seed": seed + 1})


@dataclass(slots=True)
class EngineDelta:
    """A piece of a streamed candidate.

    Attributes:
        choice: The engine's own choice object of this chunk (`text` or `delta`, `logprobs`, `finish_reason`, ...).
        token_ids: Ids of the new tokens.
        token_logprobs: Their log-probabilities: steered before temperature, or the base's when unsteered.
        prompt_token_ids: On the first delta.
        usage: On the last delta: prompt and completion tokens of this candidate.
    """

    choice: dict[str, Any]
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    usage: dict[str, Any] | None = None


@dataclass(slots=True)
class Candidate:
    """One finished candidate.

    Attributes:
        index: Its number among the candidates of its prompt, from 0.
        choice: The engine's choice object (`text` or `message`, `logprobs`, `finish_reason`, `stop_reason`, ...).
        text: The generated text alone, without an echoed prompt; of a chat message its content.
        prompt_token_ids: As the engine saw them.
        token_ids: Generated ids.
        token_logprobs: One per generated token: steered before temperature, or the base's when unsteered.
        finish_reason: OpenAI's.
        usage: The engine's usage object for this candidate.
        duration_s: From sending the request to the last byte.
        steering: What was asked of the engine; None when it was neither to steer nor to explain.
        record: The engine's record; None when there is no steering, or it was not asked for.
        explanation: What the caller is told about each token; None when not asked for.
        engine: Name of the engine that made it.
    """

    index: int
    choice: dict[str, Any]
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: str | None
    usage: dict[str, Any]
    duration_s: float
    steering: SteeringParams | None = None
    record: SteeringRecord | None = None
    explanation: dict[str, Any] | None = None
    engine: str = ""

    @property
    def is_steered(self) -> bool:
        """Whether anything moved the base."""
        return self.steering is not None and self.steering.is_active

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per generated token; minus infinity for an empty candidate. OpenAI's `best_of` order."""
        return sum(self.token_logprobs) / len(self.token_logprobs) if self.token_logprobs else float("-inf")


class Engine(Protocol):
    """An inference engine. Methods raise `EngineError`s; none ever returns an unsteered answer to a steered request."""

    @property
    def name(self) -> str:
        """For logs, metrics and rollouts."""
        ...

    async def status(self) -> EngineStatus:
        """What is loaded. Raises `EngineUnavailableError` while the engine is down or starting."""
        ...

    async def generate(self, request: EngineRequest) -> Candidate:
        """Generate one candidate. Cancelling the task aborts the engine's work.

        Raises:
            EngineRequestError: The engine refused it.
            EngineUnavailableError: It could not be reached.
            EngineDiedError: It went away in the middle.
            SteeringError: Its steering failed.
        """
        ...

    async def generate_group(self, requests: Sequence[EngineRequest]) -> list[Candidate]:
        """Candidates of one prompt that differ by their seeds alone, in order; see `EngineRequest.is_next_of`.

        The same as `generate` for each of them, at the cost of one request. Raises as `generate`; all fail together.
        """
        ...

    def stream(self, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        """Like `generate`, piece by piece. Closing the iterator aborts the engine's work.

        A delta whose steering failed is never yielded: `SteeringError` is raised instead.
        """
        ...

    async def take_records(self, uids: Sequence[str]) -> dict[str, SteeringRecord]:
        """The records of finished candidates, by uid; each can be taken once. Unknown uids are left out."""
        ...

    async def read_records(self, starts: Mapping[str, int]) -> dict[str, SteeringRecord]:
        """What was recorded so far of running candidates, which stays there.

        Args:
            starts: For each uid the number of tokens that the caller knows already; the record begins behind them.

        Returns:
            Records by uid, which may hold tokens that have not arrived yet. Unknown uids are left out.
        """
        ...

    async def prepare(self, version: VersionId, path: str) -> LoadedVersion:
        """Load and validate a version in the engine without using it.

        Raises:
            AdapterError: It is refused.
            AdapterMemoryFullError: The engine's adapter memory has no room for it now.
        """
        ...

    async def commit(self, version: VersionId) -> LoadedVersion:
        """Make a prepared version usable, between two decoding steps."""
        ...

    async def retire(self, version: VersionId) -> RetireReply:
        """Refuse new rows for a version and free it with the last row that uses it."""
        ...

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A plain JSON call to one of the engine's own routes, such as `/tokenize`."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...
