r"""From the token strings of an API to token ids.

vLLM writes ids (`token_id:17`) when it is asked to. OpenAI's API writes each token as text, or as `bytes:\xe2\x80`
where its bytes are no text by themselves; those are matched with the bytes of the tokenizer's own tokens.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_adapters.contract.errors import EngineError
from trimtab_adapters.contract.params import FAILED_LOGPROB
from trimtab_adapters.contract.sampling import TopLogprobs

_TOKEN_ID = re.compile(r"token_id:(\d{1,10})", re.ASCII)
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)", re.ASCII)

_LEAST_MAPPED = 0.5
"""Least share of the probability shown that must fall on known tokens; below it the tokenizer is another model's."""


@dataclass(frozen=True, slots=True)
class MappedTop:
    """What an API showed of one position.

    Attributes:
        top: Its most probable tokens that the tokenizer knows.
        num_unmapped: Tokens that it does not know, which are left out.
    """

    top: TopLogprobs
    num_unmapped: int


class TokenMap:
    """Knows which id a token string of the API means.

    Args:
        token_bytes: Bytes of each token, by id.
        vocabulary: Token -> id, for APIs that write tokens as the tokenizer's file does.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], vocabulary: Mapping[str, int]) -> None:
        self._by_bytes: dict[bytes, set[int]] = {}
        for token_id, data in token_bytes.items():
            self._by_bytes.setdefault(data, set()).add(token_id)
        self._by_name = vocabulary
        self._known_ids = frozenset(vocabulary.values())

    def id_of(self, token: str) -> int | None:
        """The id of a token string; None when the tokenizer has no such token.

        Raises:
            EngineError: Several tokens look like it.
        """
        if match := _TOKEN_ID.fullmatch(token):
            token_id = int(match[1])
            return token_id if token_id in self._known_ids else None
        if match := _BYTES.fullmatch(token):
            data = bytes.fromhex(match[1].replace("\\x", ""))
        else:
            data = token.encode(errors="surrogatepass")
        found = self._by_bytes.get(data)
        if found is None:
            return self._by_name.get(token)
        if len(found) > 1:
            raise EngineError(
                f"the black box's token {token!r} may be any of the tokenizer's tokens {sorted(found)}; use an API "
                "that gives token ids (--black-box-api vllm)"
            )
        return next(iter(found))

    def map_top(self, shown: Mapping[str, float], num_top: int) -> MappedTop:
        """The most probable tokens that an API showed at one position.

        Args:
            shown: Token string -> log-probability. APIs add the token that they sampled, which is not among the most
                probable ones as a rule; it is left out, or what can be sampled would depend on chance.
            num_top: k, as the API was asked.

        Raises:
            EngineError: Too much of the probability falls on tokens that the tokenizer does not know, or a string may
                be several tokens.
        """
        ranked = sorted(shown.items(), key=lambda item: -item[1])[:num_top]
        known: dict[int, float] = {}
        num_unmapped = 0
        for token, logprob in ranked:
            if not math.isfinite(logprob) or logprob <= FAILED_LOGPROB:
                continue  # vLLM's way to write minus infinity
            token_id = self.id_of(token)
            if token_id is None or token_id in known:
                num_unmapped += 1
            else:
                known[token_id] = logprob
        given = math.fsum(math.exp(logprob) for _, logprob in ranked)
        if math.fsum(map(math.exp, known.values())) < _LEAST_MAPPED * given or not known:
            raise EngineError(
                "the black box's most probable tokens are not in the tokenizer that the gateway was given; "
                "--black-box-tokenizer must be the one of --black-box-model"
            )
        return MappedTop(TopLogprobs(tuple(known), tuple(known.values())), num_unmapped)
