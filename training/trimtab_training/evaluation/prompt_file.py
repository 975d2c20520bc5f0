"""The prompts of an evaluation: what is sent to the gateway, and the text that rewards read."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import InvalidRequestError

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        path: `/v1/completions` or `/v1/chat/completions`.
        fields: Canonical JSON of the request's `prompt` or `messages`.
        text: What a reward is given: of a chat the texts of its messages, one per line, as the gateway does.
    """

    path: str
    fields: str
    text: str

    @property
    def body(self) -> dict[str, Any]:
        """Fields of the request."""
        return dict(json.loads(self.fields))


def read_prompts(path: Path, detokenize: Detokenize, *, limit: int | None = None) -> list[Prompt]:
    """The distinct prompts of a JSON Lines file, in its order.

    Each line is an object with `prompt` (text), `prompt_token_ids` or `messages` (chat, texts only); other fields are
    ignored.

    Args:
        path: The file.
        detokenize: Gives the text of token ids.
        limit: Most prompts to take, the first ones.

    Raises:
        InvalidRequestError: The file cannot be read, a line is malformed, or there is no prompt at all.
    """
    prompts: dict[str, Prompt] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(prompts) >= limit:
                    break
                if line.strip():
                    prompt = _parse_line(line, f"{path}, line {number}", detokenize)
                    prompts.setdefault(prompt.fields, prompt)
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"the prompts in {path} cannot be read: {exc}") from exc
    if not prompts:
        raise InvalidRequestError(f"{path} holds no prompts")
    return list(prompts.values())


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of what is asked, 64 hex digits."""
    return hashlib.sha256("\n".join(prompt.fields for prompt in prompts).encode()).hexdigest()


def _parse_line(line: str, where: str, detokenize: Detokenize) -> Prompt:
    try:
        data = json.loads(line)
    except ValueError as exc:
        raise InvalidRequestError(f"{where} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        data = {}
    text, token_ids, messages = data.get("prompt"), data.get("prompt_token_ids"), data.get("messages")
    if isinstance(text, str) and text:
        return Prompt("/v1/completions", _canonical({"prompt": text}), text)
    if isinstance(token_ids, list) and token_ids and all(_is_token_id(token) for token in token_ids):
        return Prompt("/v1/completions", _canonical({"prompt": token_ids}), detokenize(token_ids))
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        texts = "\n".join(message["content"] for message in messages)
        return Prompt("/v1/chat/completions", _canonical({"messages": messages}), texts)
    raise InvalidRequestError(
        f"{where} needs `prompt`, a text, `prompt_token_ids`, a list of ids, or `messages`, a list of objects with "
        "`role` and `content` that are texts"
    )


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def _is_token_id(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
