"""Reading a judge's rating. Values in, values out.

A judge that gives the probabilities of its next token tells more than the rating that it wrote: the mean of all
ratings under them. It is finer than whole numbers, and does not jump where two ratings are equally likely.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.errors import RewardError

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class JudgeText:
    """What a judge wrote.

    Attributes:
        text: All of it.
        tokens: Its tokens; None when the server does not give them.
        top_logprobs: Per token, the log-probabilities of the most likely ones at its place.
    """

    text: str
    tokens: Sequence[str] | None = None
    top_logprobs: Sequence[Sequence[tuple[str, float]]] | None = None


def read_chat(reward: str, answer: Any) -> JudgeText:
    """From an answer of `/chat/completions`. Raises `RewardError`."""
    choice = _choice(reward, answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise RewardError(f"the judge of the reward {reward!r} answered no text")
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not content:
        return JudgeText(text)
    try:
        tokens = [str(entry["token"]) for entry in content]
        top = [_checked((str(t["token"]), float(t["logprob"])) for t in entry["top_logprobs"]) for entry in content]
    except (KeyError, TypeError, ValueError) as exc:
        raise _malformed(reward) from exc
    return JudgeText(text, tokens, top)


def read_completion(reward: str, answer: Any) -> JudgeText:
    """From an answer of `/completions`. Raises `RewardError`."""
    choice = _choice(reward, answer)
    text, logprobs = choice.get("text"), choice.get("logprobs")
    if not isinstance(text, str):
        raise RewardError(f"the judge of the reward {reward!r} answered no text")
    if not isinstance(logprobs, dict) or not logprobs.get("top_logprobs"):
        return JudgeText(text)
    try:
        tokens = [str(token) for token in logprobs["tokens"]]
        top = [_checked((str(t), float(p)) for t, p in (entry or {}).items()) for entry in logprobs["top_logprobs"]]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise _malformed(reward) from exc
    if len(tokens) != len(top):
        raise _malformed(reward)
    return JudgeText(text, tokens, top)


def written_rating(reward: str, judged: JudgeText, lowest: int, highest: int) -> float:
    """The first number in the text. Raises `RewardError` when there is none, or it is out of bounds."""
    return _first_number(reward, judged, lowest, highest)[1]


def expected_rating(reward: str, judged: JudgeText, lowest: int, highest: int) -> float:
    """The mean of all ratings, weighted by their probabilities where the judge wrote the first number.

    Probabilities are taken among the ratings alone, as far as the server tells them.

    Raises:
        RewardError: As `written_rating`; or there are no probabilities, or the number is not one token.
    """
    place, _ = _first_number(reward, judged, lowest, highest)
    if judged.tokens is None or judged.top_logprobs is None:
        raise RewardError(f"the judge of the reward {reward!r} gave no log-probabilities")
    token = _token_at(reward, judged, place)
    weights = dict.fromkeys(range(lowest, highest + 1), 0.0)
    for text, logprob in judged.top_logprobs[token]:
        if text.strip().isascii() and text.strip().isdigit() and int(text) in weights:
            weights[int(text)] += math.exp(logprob)
    total = math.fsum(weights.values())
    if not total > 0.0 or not math.isfinite(total):
        raise RewardError(f"the judge of the reward {reward!r} gave no probability to any rating")
    return math.fsum(rating * weight for rating, weight in weights.items()) / total


def _first_number(reward: str, judged: JudgeText, lowest: int, highest: int) -> tuple[re.Match[str], float]:
    found = _NUMBER.search(judged.text)
    if found is None:
        raise RewardError(f"the judge of the reward {reward!r} gave no number")
    rating = float(found[0])
    if not lowest <= rating <= highest:
        raise RewardError(f"the judge of the reward {reward!r} rated outside of {lowest} to {highest}")
    return found, rating


def _token_at(reward: str, judged: JudgeText, place: re.Match[str]) -> int:
    """The token that is the number and nothing else but white space."""
    begin = 0
    for index, token in enumerate(judged.tokens or ()):
        end = begin + len(token)
        if begin <= place.start() and place.end() <= end and token.strip() == place[0]:
            return index
        begin = end
    raise RewardError(
        f"the judge of the reward {reward!r} did not write its rating as one token; use options.method 'text'"
    )


def _choice(reward: str, answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RewardError(f"the judge of the reward {reward!r} did not answer as OpenAI's API does")
    return choices[0]


def _checked(entries: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Raises `ValueError` for what is no log-probability; rounding may leave one a little above 0."""
    checked = list(entries)
    if not all(logprob <= 1e-3 for _, logprob in checked):
        raise ValueError("a probability above 1, or NaN")
    return checked


def _malformed(reward: str) -> RewardError:
    return RewardError(f"the judge of the reward {reward!r} gave log-probabilities in another form than OpenAI's")
