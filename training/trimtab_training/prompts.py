"""Prompts: where they come from, and which of them are held out for the evaluation."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab_adapters.contract.errors import IntegrityError, InvalidRequestError
from trimtab_adapters.contract.records import Rollout
from trimtab_training.durable_files import write_whole
from trimtab_training.models import Vocabulary


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as its owner wrote it: as text, or as token ids, which then say exactly what the models see."""

    text: str
    token_ids: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """What makes two prompts the same: the text."""
        return self.text


def read_prompts(path: Path, vocabulary: Vocabulary) -> list[Prompt]:
    """The distinct prompts of a JSON Lines file, in its order.

    Raises:
        InvalidRequestError: The file cannot be read, a line is malformed, or there is no prompt at all.
    """
    prompts: dict[str, Prompt] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    prompt = _parse_line(line, f"{path}, line {number}", vocabulary)
                    prompts.setdefault(prompt.key, prompt)
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"the prompts in {path} cannot be read: {exc}") from exc
    if not prompts:
        raise InvalidRequestError(f"{path} holds no prompts")
    return list(prompts.values())


def prompts_of(rollouts: Iterable[Rollout], vocabulary: Vocabulary) -> list[Prompt]:
    """The distinct prompts of logged rollouts, in the order of their first appearance."""
    prompts: dict[str, Prompt] = {}
    for rollout in rollouts:
        if rollout.prompt_token_ids:
            prompt = Prompt(prompt_text(rollout, vocabulary), tuple(rollout.prompt_token_ids))
            prompts.setdefault(prompt.key, prompt)
    return list(prompts.values())


def prompt_text(rollout: Rollout, vocabulary: Vocabulary) -> str:
    """The text of a rollout's prompt, decoded where the caller sent token ids."""
    return rollout.prompt if rollout.prompt is not None else vocabulary.decode(rollout.prompt_token_ids)


def hold_out(prompts: Sequence[Prompt], share: float, *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split into training and held-out prompts, both in their old order.

    The side of a prompt depends on its text and the seed alone (`is_held_out`), so it stays when other prompts come
    or go; `share` is met on average. Only where one side would be empty, the prompt next to it changes over; with a
    positive share and two different prompts, neither side is empty.
    """
    places = {prompt: _place(prompt.text, seed) for prompt in prompts}
    if share <= 0.0 or len(set(places.values())) < 2:
        return list(prompts), []
    lowest, highest = min(places.values()), max(places.values())
    held_out = {prompt for prompt, place in places.items() if (place < share or place == lowest) and place != highest}
    return [p for p in prompts if p not in held_out], [p for p in prompts if p in held_out]


def is_held_out(text: str, share: float, *, seed: int) -> bool:
    """Whether a prompt of this text belongs to the held-out share."""
    return _place(text, seed) < share


def same_prompt(text: str) -> str:
    """Equal for prompts that are one and the same to a reader: white space, letter case and Unicode forms apart."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _place(text: str, seed: int) -> float:
    """A place in [0, 1) that looks random."""
    digest = hashlib.sha256(f"{seed}\0{same_prompt(text)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def save_split(path: Path, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Write the split of a run, so that a resumed one keeps it although the log has grown meanwhile."""
    split = {"train": train, "held_out": held_out}
    write_whole(path, json.dumps({name: [asdict(prompt) for prompt in prompts] for name, prompts in split.items()}))


def load_split(path: Path) -> tuple[list[Prompt], list[Prompt]]:
    """Read what `save_split` wrote: training and held-out prompts.

    Raises:
        IntegrityError: It cannot be read.
    """
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        train, held_out = (
            [Prompt(str(p["text"]), None if p["token_ids"] is None else tuple(p["token_ids"])) for p in split[name]]
            for name in ("train", "held_out")
        )
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise IntegrityError(f"the prompts of the run in {path} cannot be read: {exc}") from exc
    return train, held_out


def _parse_line(line: str, where: str, vocabulary: Vocabulary) -> Prompt:
    try:
        data = json.loads(line)
    except ValueError as exc:
        raise InvalidRequestError(f"{where} is not JSON: {exc}") from exc
    text = data.get("prompt") if isinstance(data, dict) else None
    token_ids = data.get("prompt_token_ids") if isinstance(data, dict) else None
    if isinstance(text, str) and text:
        return Prompt(text)
    if isinstance(token_ids, list) and token_ids and all(_is_id(token, vocabulary) for token in token_ids):
        return Prompt(vocabulary.decode(token_ids), tuple(token_ids))
    raise InvalidRequestError(
        f"{where} needs `prompt`, a text, or `prompt_token_ids`, a list of ids below {vocabulary.num_tokens}"
    )


def _is_id(token: object, vocabulary: Vocabulary) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocabulary.num_tokens
