"""Regular expressions that cannot hang the gateway."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import regex

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError

MAX_PATTERN_LENGTH = 4096

FLAGS = {"ignore_case": regex.IGNORECASE, "multi_line": regex.MULTILINE, "dot_all": regex.DOTALL}


class TimedPattern:
    """A pattern of the library `regex`, which can be interrupted; `re` cannot. It runs without the interpreter's lock.

    Args:
        reward: Name of the reward, for messages.
        pattern: In the syntax of `regex`, which takes in that of `re`.
        flags: Keys of `FLAGS`.
        timeout_s: Most time for one text.
        param: The option that holds the pattern, for messages.

    Raises:
        InvalidRequestError: It is no regular expression.
    """

    def __init__(self, reward: str, pattern: str, *, flags: Sequence[str] = (), timeout_s: float, param: str) -> None:
        self._reward = reward
        self._timeout_s = timeout_s
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise InvalidRequestError(f"the pattern is longer than {MAX_PATTERN_LENGTH} characters", param=param)
        combined = regex.VERSION0
        for flag in flags:
            combined |= FLAGS[flag]
        try:
            self._pattern = regex.compile(pattern, combined)
        except (regex.error, OverflowError, RecursionError) as exc:
            raise InvalidRequestError(f"the pattern is no regular expression: {exc}", param=param) from exc

    @property
    def num_groups(self) -> int:
        """How many groups it has."""
        return int(self._pattern.groups)

    def find_group(self, text: str) -> str | None:
        """The first group of the first match; None where there is none. Raises `RewardError`."""
        with self._timed():
            match = self._pattern.search(text, timeout=self._timeout_s, concurrent=True)
        return None if match is None or match[1] is None else str(match[1])

    def is_match(self, text: str) -> bool:
        """Whether it matches anywhere. Raises `RewardError`."""
        with self._timed():
            return self._pattern.search(text, timeout=self._timeout_s, concurrent=True) is not None

    def is_full_match(self, text: str) -> bool:
        """Whether it matches the whole text. Raises `RewardError`."""
        with self._timed():
            return self._pattern.fullmatch(text, timeout=self._timeout_s, concurrent=True) is not None

    def count(self, text: str) -> int:
        """How many matches there are that do not overlap. Raises `RewardError`."""
        with self._timed():
            return sum(1 for _ in self._pattern.finditer(text, timeout=self._timeout_s, concurrent=True))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as exc:
            raise RewardError(
                f"the pattern of the reward {self._reward!r} took longer than {self._timeout_s:g} s on one text"
            ) from exc
