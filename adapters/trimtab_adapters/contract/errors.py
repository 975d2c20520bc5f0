"""The one error tree of Trimtab.

```
TrimtabError
├── RequestError                 the caller must change the request
│   ├── InvalidRequestError      400  malformed, out of bounds, not allowed together
│   ├── AuthenticationError      401  no key or a wrong one
│   ├── PermissionDeniedError    403  the key may not do this
│   ├── NotFoundError            404  unknown model, adapter, version, job, rollout
│   └── ConflictError            409  the state forbids it (still in use, name taken)
├── AdapterError                 400  an adapter version cannot be used
│   ├── ManifestError                 manifest missing, malformed or not matching the files
│   ├── IntegrityError                a file is missing, or its hash or size differs
│   ├── UnsafeFileError               pickle, remote code, a path that leaves the directory
│   ├── VocabularyError               another tokenizer than the base model's
│   ├── WeightsError                  NaN or Inf weights, shapes that do not fit
│   └── AdapterTooLargeError          more than the engine's whole budget of adapter memory
├── EngineError
│   ├── EngineUnavailableError   503  no engine is ready; `retry_after_s` says when to ask again
│   │   └── AdapterMemoryFullError    all adapter memory is taken by versions in use or kept
│   ├── EngineRequestError            the engine refused the request; carries its status and error object
│   ├── EngineTimeoutError       504  the answer took longer than the gateway allows
│   └── EngineDiedError          503  it went away in the middle of an answer; ask again
├── SteeringError                500  steering of this request failed; it is never answered unsteered
├── RewardError                  502  a reward could not be computed; never 0
└── StorageError                 500  the database or the spool failed
```

Foreign exceptions are translated once, at the boundary where they enter, with `raise ... from`.
"""

from typing import Any, ClassVar


class TrimtabError(Exception):
    """Root of all errors that Trimtab raises on purpose.

    Args:
        message: What is wrong and what to do about it; shown to the caller.
        param: The request field at fault, in OpenAI's sense.
        code: A stable machine-readable word; the class's own when not given.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code


class RequestError(TrimtabError):
    """The caller must change the request."""

    status = 400
    type = "invalid_request_error"


class InvalidRequestError(RequestError):
    """Malformed, out of bounds, or fields that do not go together."""


class AuthenticationError(RequestError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    """The key is valid but may not do this."""

    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class NotFoundError(RequestError):
    """An unknown model, adapter, version, job or rollout."""

    status = 404
    type = "not_found_error"
    default_code = "not_found"


class ConflictError(RequestError):
    """The current state forbids it: still in use, name taken, already retired."""

    status = 409
    type = "conflict_error"
    default_code = "conflict"


class AdapterError(TrimtabError):
    """An adapter version cannot be used."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_adapter"


class ManifestError(AdapterError):
    """The manifest is missing, malformed or does not match the files."""

    default_code = "invalid_manifest"


class IntegrityError(AdapterError):
    """A file is missing, or its hash or size differs from the manifest."""

    default_code = "integrity"


class UnsafeFileError(AdapterError):
    """A pickle, remote code, or a path that leaves the directory."""

    default_code = "unsafe_file"


class VocabularyError(AdapterError):
    """The adapter LM was made for another tokenizer than the base model's."""

    default_code = "vocabulary_mismatch"


class WeightsError(AdapterError):
    """NaN or infinite weights, or shapes that do not fit the configuration."""

    default_code = "invalid_weights"


class AdapterTooLargeError(AdapterError):
    """The adapter LM alone is larger than the engine's budget of adapter memory."""

    default_code = "adapter_too_large"


def adapter_error(message: str, code: object) -> AdapterError:
    """The error of an adapter version that an engine refused, by the code that came with the refusal."""
    for kind in AdapterError.__subclasses__():
        if kind.default_code == code:
            return kind(message)
    return AdapterError(message, code=code if isinstance(code, str) else None)


class EngineError(TrimtabError):
    """Something between the gateway and an engine."""

    default_code = "engine_error"


class EngineUnavailableError(EngineError):
    """No engine is ready to take the request.

    Args:
        message: Shown to the caller.
        retry_after_s: When to ask again, in seconds.
    """

    status = 503
    default_code = "engine_unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AdapterMemoryFullError(EngineUnavailableError):
    """All adapter memory of the engine is taken by versions that are in use or kept; some must be let go first."""

    default_code = "adapter_memory_full"


class EngineRequestError(EngineError):
    """The engine refused the request; its own status and error object travel on.

    Args:
        message: The engine's message.
        engine_status: HTTP status that the engine answered.
        error: The engine's error object, if it sent one.
    """

    def __init__(self, message: str, *, engine_status: int, error: dict[str, Any] | None = None) -> None:
        super().__init__(message, param=(error or {}).get("param"))
        self.engine_status = engine_status
        self.error = error or {}


class EngineTimeoutError(EngineError):
    """The answer took longer than the gateway allows."""

    status = 504
    default_code = "request_timeout"


class EngineDiedError(EngineError):
    """The engine went away in the middle of an answer. As an answer's status it means that nothing was delivered."""

    status = 503
    default_code = "engine_died"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SteeringError(TrimtabError):
    """Steering of this request failed; a request that asked for steering is never answered unsteered."""

    default_code = "steering_failed"


class RewardError(TrimtabError):
    """A reward could not be computed. A missing reward is never 0."""

    status = 502
    default_code = "reward_failed"


class RewardUnavailableError(RewardError):
    """Whatever keeps a reward from answering may pass, so the same call may succeed later.

    A reward of one's own may raise it too: it is tried again, and too many of them in a row open the circuit breaker.

    Args:
        message: Shown to the caller.
        retry_after_s: When to ask again, in seconds, where that is known.
        is_retriable: Whether the gateway may try again by itself, for the same call.
    """

    status = 503
    default_code = "reward_unavailable"

    def __init__(self, message: str, *, retry_after_s: float | None = None, is_retriable: bool = True) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_retriable = is_retriable


class RewardChangedError(RewardError):
    """The reward answered from another version than the one that the request began with.

    Scores of two versions cannot be compared, so none are given.
    """

    status = 503
    default_code = "reward_changed"


class StorageError(TrimtabError):
    """The database or the spool failed."""

    default_code = "storage_error"


class TrainingError(TrimtabError):
    """A training run cannot go on. Its checkpoints stay, and it can be resumed when the reason is gone."""

    default_code = "training_failed"


class TrainingLimitError(TrainingError):
    """The run took more time or memory than its configuration allows."""

    default_code = "training_limit"


class ProcessLostError(TrainingError):
    """One of the processes that trained together ended, so the others cannot take another step."""

    default_code = "process_lost"
