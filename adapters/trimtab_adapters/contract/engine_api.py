"""The HTTP contract between the gateway and Trimtab's routes inside the engine (`/trimtab/*`).

Completions themselves go through vLLM's own OpenAI routes; these carry what vLLM has no route for.

| route | body | answer |
|---|---|---|
| `GET /trimtab/status` | | `EngineStatus` |
| `POST /trimtab/adapters/prepare` | `PrepareRequest` | `LoadedVersion` once loaded; 400 refused, 409 no room |
| `POST /trimtab/adapters/commit` | `VersionRequest` | `LoadedVersion`; requests may name the version from now on |
| `POST /trimtab/adapters/retire` | `VersionRequest` | `RetireReply`; memory is freed with the last row that uses it |
| `POST /trimtab/records/take` | `TakeRequest` | `TakeReply`; each record can be taken once |
| `POST /trimtab/records/read` | `ReadRequest` | `TakeReply`; records so far, which stay; for explanations in a stream |

Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.contract.records import SteeringRecord


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PrepareRequest(_Message):
    """Load a version from a directory that the engine can read."""

    version: VersionId
    path: str


class VersionRequest(_Message):
    """Name one loaded version."""

    version: VersionId


class VersionActivity(_Message):
    """What one adapter version did since it was loaded. Sums, so that rates are differences of two answers."""

    steps: int = 0
    """Forward passes that ended in log-probabilities."""
    step_seconds: float = 0.0
    """Time in them, prefill and attention included."""
    rows: int = 0
    """Rows of them: tokens that it steered."""
    hit_tokens: int = 0
    """Tokens found in the cache by name."""
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    """Tokens whose keys and values were given up for other rows, and computed again."""


class LoadedVersion(_Message):
    """One adapter version in the engine's memory."""

    version: VersionId
    name: str
    state: Literal["loading", "prepared", "committed", "retiring", "failed"]
    weight_bytes: int = 0
    """Of its own; the LM under a LoRA is counted once in `WeightStatus`. While it loads: what is kept free for it; when
    it failed for want of memory: what it would take."""
    cache_bytes: int = 0
    """Blocks of the KV cache that hold its keys and values, in use or only kept."""
    active_rows: int = 0
    activity: VersionActivity = VersionActivity()
    error: str | None = None
    error_code: str | None = None


class WeightStatus(_Message):
    """Memory of the adapter LMs' weights, those of a LM that several LoRAs share counted once."""

    budget_bytes: int | None
    """None: no bound."""
    used_bytes: int
    """Loaded, or kept free for versions that are loading."""


class CacheStatus(_Message):
    """The adapter LMs' KV cache."""

    budget_bytes: int
    allocated_bytes: int
    used_blocks: int
    cached_blocks: int
    total_blocks: int
    block_size: int
    hit_tokens: int
    computed_tokens: int
    recomputed_tokens: int


class ProviderStatus(_Message):
    """The API behind which a black-box base is; sums since the gateway started, as the provider's `usage` says."""

    breaker: Literal["closed", "open", "half_open"]
    """`open`: it did not answer lately and is not asked for a while."""
    calls: int
    retries: int
    failed_calls: int
    """Calls that got no useful answer in all attempts."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    unmapped_tokens: int
    """Tokens among the most probable ones shown that the gateway's tokenizer does not know."""
    resplit_calls: int
    """Calls whose prompt the provider split into another number of tokens than the gateway."""


class EngineStatus(_Message):
    """What the gateway must know of an engine before it sends requests there."""

    boot_id: str
    """Changes when the engine process restarts: everything loaded before is gone."""
    kind: Literal["vllm", "black_box", "transformers"] = "vllm"
    """`black_box`: the base is behind somebody else's API, and adapters run in the gateway. `transformers`: both run
    there."""
    vllm_version: str
    """Empty where the base is not in vLLM."""
    runner: Literal["v1", "v2", "none"]
    model: str
    max_model_len: int
    max_output_len: int | None = None
    """Longest answer, where a base with an encoder bounds it apart from the prompt."""
    vocab_size: int
    """Width of the base model's logits."""
    vocabulary_sha256: str
    num_tokens: int
    """Number of tokens of the tokenizer."""
    versions: list[LoadedVersion]
    cache: CacheStatus
    weights: WeightStatus
    can_guide: bool = False
    """Whether the base can be its own expert under a negative prompt."""
    steered_rows: int = 0
    steered_steps: int = 0
    failed_rows: int = 0
    provider: ProviderStatus | None = None
    """Of a black box."""

    @property
    def base_identity(self) -> str:
        """Hash of what is known of the base behind its public name: where it was loaded from, and its vocabulary.

        A hash because callers see it, and paths of the engine's machine are no concern of theirs.
        """
        return hashlib.sha256(f"{self.model}\0{self.vocabulary_sha256}".encode()).hexdigest()[:16]


class RetireReply(_Message):
    """`freed` is False while rows still use the version; they keep it to their last token."""

    version: VersionId
    freed: bool
    active_rows: int


class TakeRequest(_Message):
    """Ask for the records of these candidates."""

    uids: list[str] = Field(max_length=4096)


class ReadRequest(_Message):
    """Ask for what was recorded of running candidates: uid -> number of tokens that are known already."""

    starts: dict[str, int] = Field(max_length=4096)


class TakeReply(_Message):
    """Records found; a uid that never reached the sampler is in `missing`."""

    records: list[SteeringRecord]
    missing: list[str]
