"""The base's tokenizer, from a directory or the Hub: text and messages to ids, ids to text, tokens to bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from trimtab_adapters.contract.errors import InvalidRequestError, VocabularyError


class BaseTokenizer:
    """A fast tokenizer. Build it with `load_base_tokenizer`. May be used from several threads.

    Attributes:
        vocabulary: Token -> id, added tokens included.
        eos_token_ids: Tokens that end an answer by themselves.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer: Any = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.eos_token_ids = eos_token_ids

    @property
    def num_tokens(self) -> int:
        """Largest id + 1."""
        return max(self.vocabulary.values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete characters become U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Messages as the tokenizer's chat template writes them.

        Args:
            messages: With texts as their contents.
            options: `add_generation_prompt`, `continue_final_message`, and variables of the template.

        Raises:
            InvalidRequestError: There is no template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "The base model's tokenizer has no chat template, so that messages cannot be turned into a prompt; use "
                "/v1/completions, or give the gateway a tokenizer with one.",
                param="messages",
            )
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except (TemplateError, ValueError, TypeError, KeyError) as exc:
            raise InvalidRequestError(f"The chat template refuses these messages: {exc}", param="messages") from exc

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes that each token stands for, by id; tokens of which that cannot be told are left out."""
        spec = json.loads(self._backend.to_str())
        added = {int(token["id"]): str(token["content"]) for token in spec.get("added_tokens", [])}
        to_bytes = _byte_level if _mentions(spec, "ByteLevel") else _sentence_piece
        found: dict[int, bytes] = {}
        for token, token_id in self.vocabulary.items():
            data = added[token_id].encode() if token_id in added else to_bytes(token)
            if data is not None:
                found[token_id] = data
        return found


def load_base_tokenizer(name: str) -> BaseTokenizer:
    """The tokenizer of a directory or of a model on the Hub.

    Raises:
        VocabularyError: There is none, or not a fast one.
    """
    path = Path(name).expanduser()
    source = str(path) if path.is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise VocabularyError(f"{name} has no tokenizer that can be loaded: {exc}") from exc
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise VocabularyError(f"{name} has no tokenizer.json (a fast tokenizer), which steering needs")
    return BaseTokenizer(tokenizer, frozenset(_eos_token_ids(source, tokenizer)))


def _eos_token_ids(source: str, tokenizer: Any) -> set[int]:
    """The tokenizer's, and those of the model's generation configuration where it is beside it."""
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    try:
        configured: Any = GenerationConfig.from_pretrained(source).eos_token_id
    except (OSError, ValueError):
        return found
    more = configured if isinstance(configured, list) else [configured]
    return found | {int(token_id) for token_id in more if token_id is not None}


def _mentions(spec: Mapping[str, Any], kind: str) -> bool:
    """Whether a part of a tokenizer that maps bytes to letters is of this type."""
    parts = [spec.get("pre_tokenizer"), spec.get("decoder")]
    return any(f'"type": "{kind}"' in json.dumps(part) for part in parts if part)


def _byte_level(token: str) -> bytes | None:
    """GPT-2's alphabet: every byte has a printable letter."""
    try:
        return bytes(_LETTERS[letter] for letter in token)
    except KeyError:
        return None


def _sentence_piece(token: str) -> bytes | None:
    """SentencePiece: `▁` is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token.encode()
    return token.replace("▁", " ").encode()


def _letters() -> dict[str, int]:
    """Letter -> byte. Printable Latin-1 stands for itself, the other bytes for U+0100 on, in their order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_LETTERS = _letters()
