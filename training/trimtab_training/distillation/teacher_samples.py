"""What a teacher wrote, with what it thought of its tokens."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab_adapters.contract.errors import IntegrityError
from trimtab_training.durable_files import writing_whole


@dataclass(frozen=True, slots=True)
class TeacherSample:
    """One output of the teacher; logarithms are natural.

    Attributes:
        prompt: Its text, which says whether the sample is held out.
        prompt_token_ids: At least one id.
        output_token_ids: At least one id.
        logprobs: The teacher's of each output token.
        top_token_ids: The teacher's most probable tokens at each output token; rows may differ in length and are empty
            when none were asked for.
        top_logprobs: Their log-probabilities.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_token_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()


def save_samples(path: Path, samples: Iterable[TeacherSample]) -> None:
    """Write samples as JSON Lines, complete or not at all."""
    with writing_whole(path) as file:
        file.writelines(json.dumps(asdict(sample)).encode() + b"\n" for sample in samples)


def load_samples(path: Path) -> list[TeacherSample]:
    """Read what `save_samples` wrote.

    Raises:
        IntegrityError: It cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return [_sample(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise IntegrityError(f"the teacher's samples in {path} cannot be read: {exc}") from exc


def _sample(data: dict[str, object]) -> TeacherSample:
    return TeacherSample(**{key: _tuples(value) for key, value in data.items()})  # type: ignore[arg-type]


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
