"""Scoring outputs in training: by the gateway, or by an entry point in this process."""

import asyncio
import hashlib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, check_scores
from trimtab_training.gateway import GatewayClient, ScoreReply

ENTRY_POINT_GROUP = "trimtab.rewards"


class Scorer(Protocol):
    """Gives rewards; larger is better."""

    @property
    def name(self) -> str:
        """Name of the reward."""
        ...

    def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
        """One finite reward per input, in order, and the version that gave them. Raises `RewardError`."""
        ...


class GatewayScorer:
    """A reward that the gateway computes."""

    def __init__(self, gateway: GatewayClient, name: str, *, batch_size: int) -> None:
        self._gateway = gateway
        self._name = name
        self._batch_size = batch_size

    @property
    def name(self) -> str:
        """Name of the reward."""
        return self._name

    def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
        """See `Scorer`."""
        starts = range(0, len(inputs), self._batch_size)
        replies = [self._gateway.score(self._name, inputs[i : i + self._batch_size]) for i in starts]
        versions = {reply.version for reply in replies}
        if len(versions) != 1:
            raise RewardError(f"the reward {self._name!r} changed while it scored: versions {sorted(versions)}")
        return ScoreReply(rewards=[r for reply in replies for r in reply.rewards], version=versions.pop())


class LocalScorer:
    """A reward of the entry point group `trimtab.rewards`, called in this process.

    Args:
        name: Name of the reward.
        target: A function `f(prompt, output) -> float`, a function `f(inputs) -> scores`, or an object or class with
            a method `score(inputs)`; each may be `async`. Its version is its attribute `version`, else a hash of its
            module's source.
    """

    def __init__(self, name: str, target: Any) -> None:
        self._name = name
        if inspect.isclass(target):
            target = target()
        self._score = _batch_function(name, target)
        self._version = str(getattr(target, "version", None) or _source_hash(name, target))

    @classmethod
    def load(cls, name: str) -> "LocalScorer":
        """Load the entry point of that name.

        Raises:
            InvalidRequestError: No installed package has it, or it is nothing that can score.
        """
        points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
        if not points:
            raise InvalidRequestError(f"no installed package publishes a reward {name!r} (group {ENTRY_POINT_GROUP})")
        try:
            target = points[0].load()
        except (ImportError, AttributeError) as exc:
            raise InvalidRequestError(f"the reward {name!r} ({points[0].value}) cannot be imported: {exc}") from exc
        return cls(name, target)

    @property
    def name(self) -> str:
        """Name of the reward."""
        return self._name

    def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
        """See `Scorer`."""
        try:
            scores = self._score(inputs)
        except Exception as exc:  # a reward is foreign code, which may raise anything
            raise RewardError(f"the reward {self._name!r} raised {type(exc).__name__}: {exc}") from exc
        return ScoreReply(rewards=check_scores(self._name, scores, len(inputs)), version=self._version)


class RatedOnly:
    """Stands where people give the rewards: it has a name and cannot score."""

    version = "ratings"

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
        """Never succeeds: what nobody has rated has no reward."""
        raise RewardError(f"the reward {self.name!r} is given by people, so {len(inputs)} outputs cannot be scored now")


class SingleVersionScorer:
    """Refuses to go on when the reward's version changes: rewards of two versions cannot be ranked together.

    Args:
        scorer: Asked for the rewards.
        version: The version so far, from a checkpoint; None at the start.
    """

    def __init__(self, scorer: Scorer, version: str | None = None) -> None:
        self._scorer = scorer
        self.version = version

    @property
    def name(self) -> str:
        """Name of the reward."""
        return self._scorer.name

    def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
        """See `Scorer`."""
        reply = self._scorer.score(inputs)
        if self.version is not None and reply.version != self.version:
            raise RewardError(
                f"the reward {self.name!r} changed from version {self.version} to {reply.version} during the run; "
                "start a new run with it"
            )
        self.version = reply.version
        return reply


def _batch_function(name: str, target: Any) -> Callable[[Sequence[RewardInput]], list[Any]]:
    score = getattr(target, "score", None)
    if callable(score):
        return lambda inputs: list(_result(score(inputs)))
    if not callable(target):
        raise InvalidRequestError(f"the reward {name!r} is {type(target).__name__}, which cannot score")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(target).parameters.values()
    num_required = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
    if num_required == 1:
        return lambda inputs: list(_result(target(inputs)))
    if num_required == 2:
        return lambda inputs: [_result(target(item.prompt, item.output)) for item in inputs]
    raise InvalidRequestError(f"the reward {name!r} must take (prompt, output) or (inputs)")


def _result(answer: Any) -> Any:
    """What code gives, also when it has to be awaited; training has no event loop of its own."""
    return asyncio.run(answer) if inspect.iscoroutine(answer) else answer


def _source_hash(name: str, target: Any) -> str:
    subject = inspect.unwrap(target if inspect.isroutine(target) else type(target))
    try:
        source = inspect.getsource(inspect.getmodule(subject) or subject)
    except (OSError, TypeError) as exc:
        raise InvalidRequestError(f"the reward {name!r} needs an attribute `version`: its source is gone") from exc
    return hashlib.sha256(f"{source}\n{subject.__qualname__}".encode()).hexdigest()[:12]
