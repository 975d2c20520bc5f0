"""Rewards that are Python code, published by an installed package under the entry point group `trimtab.rewards`."""

import asyncio
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import JsonValue

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import RewardInput, check_scores

ENTRY_POINT_GROUP = "trimtab.rewards"

EntryPointLookup = Callable[[], Iterable[EntryPoint]]
Options = Mapping[str, JsonValue]

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def installed_entry_points() -> Iterable[EntryPoint]:
    """The entry points of the group `trimtab.rewards` of all installed packages."""
    return entry_points(group=ENTRY_POINT_GROUP)


class _Code:
    """Name and version of a reward that is code."""

    def __init__(self, name: str, version: str) -> None:
        self._name = name
        self._version = version

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._version


class CallableReward(_Code):
    """A reward that calls Python code in a thread.

    Args:
        name: Name of the reward.
        version: See `wrap_callable`.
        score_batch: Scores a batch; may raise anything.
    """

    def __init__(self, name: str, version: str, score_batch: Callable[[Sequence[RewardInput]], list[Any]]) -> None:
        super().__init__(name, version)
        self._score_batch = score_batch

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order.

        Raises:
            RewardError: The code raised, or returned something else than a finite number. The message names the
                reward and the position and never holds the text; the cause is chained.
        """
        return check_scores(self._name, self._score_batch(inputs), len(inputs))


class AsyncCallableReward(_Code):
    """A reward that awaits Python code on the event loop.

    Args:
        name: Name of the reward.
        version: See `wrap_callable`.
        score_batch: Scores a batch; may raise anything, but not block.
    """

    def __init__(
        self, name: str, version: str, score_batch: Callable[[Sequence[RewardInput]], Awaitable[list[Any]]]
    ) -> None:
        super().__init__(name, version)
        self._score_batch = score_batch

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See `CallableReward.score`."""
        return check_scores(self._name, await self._score_batch(inputs), len(inputs))


def load_callable(
    name: str, target: str, options: Options | None = None, *, lookup: EntryPointLookup | None = None
) -> CallableReward | AsyncCallableReward:
    """Load the entry point `target` as the reward `name`; installed ones unless `lookup` says otherwise.

    Raises:
        InvalidRequestError: There is no such entry point, it cannot be imported, or it is nothing that can score.
    """
    return wrap_callable(name, _load(find_entry_point(target, lookup or installed_entry_points)), options)


def wrap_callable(name: str, scorer: Any, options: Options | None = None) -> CallableReward | AsyncCallableReward:
    """Make a reward of Python code.

    It may be any of
    - a function `f(prompt: str, output: str) -> float`, called once per input;
    - a function `f(inputs: Sequence[RewardInput]) -> Sequence[float]`, called once per batch; the number of required
      positional parameters, two or one, tells it from the former;
    - an object with a method `score(inputs)` like the latter, or a class of such objects.
    Plain ones run in a thread, `async` ones on the event loop, where they must not block. Options are passed as keyword
    arguments: to a function at each call, to a class when it is instantiated.

    The version is the attribute `version` of the function, class or object when it has one, else a hash of the source
    of the module that defines it. A reward whose scores depend on anything outside of its module (a word list, a
    model, another package) should set `version`. Options, when given, are part of the version.

    Raises:
        InvalidRequestError: It is none of them, does not take these options, or has no version.
    """
    arguments = dict(options or {})
    is_class = inspect.isclass(scorer)
    if is_class:
        scorer = _instantiate(name, scorer, arguments)
    has_score = callable(getattr(scorer, "score", None))
    if not has_score and (is_class or not callable(scorer)):
        raise InvalidRequestError(
            f"the reward {name!r} is {type(scorer).__name__}; it must be a function f(prompt, output) or "
            "have a method score(inputs)",
            param="target",
        )
    if has_score and arguments and not is_class:
        raise InvalidRequestError(f"the reward {name!r} is an object and takes no options", param="options")
    version = _version(name, scorer, arguments)
    if has_score:
        function, arguments, is_single = scorer.score, {}, False
    else:
        function, is_single = scorer, _takes_one_input(name, scorer, arguments)
    if _is_coroutine_function(function):
        awaited = _async_single_scorer if is_single else _async_batch_scorer
        return AsyncCallableReward(name, version, awaited(name, function, arguments))
    plain = _single_scorer if is_single else _batch_scorer
    return CallableReward(name, version, plain(name, function, arguments))


def find_entry_point(target: str, lookup: EntryPointLookup = installed_entry_points) -> EntryPoint:
    """The entry point of that name.

    Raises:
        InvalidRequestError: None has it, or several packages give it to different objects.
    """
    found = {point.value: point for point in lookup() if point.name == target}
    if not found:
        known = ", ".join(sorted({point.name for point in lookup()})) or "none"
        raise InvalidRequestError(
            f"no installed package publishes the entry point {target!r} in the group {ENTRY_POINT_GROUP}; "
            f"known: {known}",
            param="target",
        )
    if len(found) > 1:
        raise InvalidRequestError(
            f"the entry point {target!r} of the group {ENTRY_POINT_GROUP} is ambiguous: {', '.join(sorted(found))}",
            param="target",
        )
    return next(iter(found.values()))


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    # Importing runs foreign code, which may raise anything.
    except (Exception, SystemExit) as exc:
        raise InvalidRequestError(
            f"the entry point {point.name!r} ({point.value}) cannot be imported: {type(exc).__name__}: {exc}",
            param="target",
        ) from exc


def _instantiate(name: str, scorer: type, options: dict[str, Any]) -> Any:
    try:
        return scorer(**options)
    # The constructor is foreign code, which may raise anything.
    except (Exception, SystemExit) as exc:
        raise InvalidRequestError(
            f"the reward {name!r} cannot be made with options {sorted(options)}: {type(exc).__name__}: {exc}",
            param="options",
        ) from exc


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _takes_one_input(name: str, function: Callable[..., Any], options: Options) -> bool:
    """Whether a function is called with prompt and output, and not with a batch."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(f"the reward {name!r} has no readable signature", param="target") from exc
    num_required = len(_required(signature, options))
    if num_required in (1, 2) and _accepts(signature, num_required, options):
        return num_required == 2
    raise InvalidRequestError(
        f"the reward {name!r} has the signature {signature}; it must take (prompt, output) or (inputs)"
        + (f" and the options {sorted(options)}" if options else " and give everything else a default"),
        param="options" if options else "target",
    )


def _required(signature: inspect.Signature, options: Options) -> list[inspect.Parameter]:
    """The parameters that the inputs fill: positional, without a default and not set by an option."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        p
        for p in signature.parameters.values()
        if p.kind in positional and p.default is inspect.Parameter.empty and p.name not in options
    ]


def _accepts(signature: inspect.Signature, num_positional: int, options: Options) -> bool:
    try:
        signature.bind(*[None] * num_positional, **options)
    except TypeError:
        return False
    return True


def _single_scorer(
    name: str, function: Callable[..., Any], options: Options
) -> Callable[[Sequence[RewardInput]], list[Any]]:
    def score_batch(inputs: Sequence[RewardInput]) -> list[Any]:
        scores = []
        for position, item in enumerate(inputs, start=1):
            with _translated(name, f"for output {position} of {len(inputs)}"):
                scores.append(function(item.prompt, item.output, **options))
        return scores

    return score_batch


def _batch_scorer(
    name: str, function: Callable[..., Any], options: Options
) -> Callable[[Sequence[RewardInput]], list[Any]]:
    def score_batch(inputs: Sequence[RewardInput]) -> list[Any]:
        with _translated(name, _where(inputs)):
            return list(function(inputs, **options))

    return score_batch


def _async_single_scorer(
    name: str, function: Callable[..., Awaitable[Any]], options: Options
) -> Callable[[Sequence[RewardInput]], Awaitable[list[Any]]]:
    async def score_one(item: RewardInput, where: str) -> Any:
        with _translated(name, where):
            return await function(item.prompt, item.output, **options)

    async def score_batch(inputs: Sequence[RewardInput]) -> list[Any]:
        places = [f"for output {position} of {len(inputs)}" for position in range(1, len(inputs) + 1)]
        return await asyncio.gather(*map(score_one, inputs, places))

    return score_batch


def _async_batch_scorer(
    name: str, function: Callable[..., Awaitable[Any]], options: Options
) -> Callable[[Sequence[RewardInput]], Awaitable[list[Any]]]:
    async def score_batch(inputs: Sequence[RewardInput]) -> list[Any]:
        with _translated(name, _where(inputs)):
            return list(await function(inputs, **options))

    return score_batch


def _where(inputs: Sequence[RewardInput]) -> str:
    return "for output 1 of 1" if len(inputs) == 1 else f"on a batch of {len(inputs)} outputs"


@contextmanager
def _translated(name: str, where: str) -> Iterator[None]:
    """A reward is foreign code, which may raise anything; what may pass, it says with an error of ours."""
    try:
        yield
    except RewardUnavailableError:
        raise
    except (Exception, SystemExit) as exc:
        raise RewardError(f"the reward {name!r} raised {type(exc).__name__} {where}") from exc


def _version(name: str, scorer: Any, options: Options) -> str:
    explicit = getattr(scorer, "version", None)
    version = _source_hash(name, scorer) if explicit is None else str(explicit)
    if _VERSION.fullmatch(version) is None:
        raise InvalidRequestError(
            f"the version of the reward {name!r} must be 1 to 64 letters, digits and '._+-', starting with a letter "
            "or digit",
            param="target",
        )
    return f"{version}+{_short_hash(json.dumps(dict(options), sort_keys=True))}" if options else version


def _source_hash(name: str, scorer: Any) -> str:
    """Hash of the module that defines it: helpers and word lists next to a function change its scores as well."""
    subject = inspect.unwrap(scorer if inspect.isroutine(scorer) else type(scorer))
    try:
        # The arguments of a partial are in no source.
        if isinstance(scorer, functools.partial):
            raise TypeError("a partial has no source")
        source = inspect.getsource(inspect.getmodule(subject) or subject)
    except (OSError, TypeError) as exc:
        raise InvalidRequestError(
            f"the source of the reward {name!r} cannot be read; give it an attribute `version`", param="target"
        ) from exc
    return _short_hash(f"{source}\n{subject.__qualname__}")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
