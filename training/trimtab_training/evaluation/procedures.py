"""Inference-time procedures: what is done with a policy's samples before an answer is given (InfAlign's T)."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from trimtab_adapters.contract.errors import InvalidRequestError

_MAX_N = 1024
_BESIDE_SELECTION = ("best_of", "calibration")
"""Request fields of their own, which a served procedure may also name."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best, or the worst, of `n` independent samples by the reward; ties at random. Worked out from plain samples.

    Worst-of-n is the attacker who draws n answers and keeps the least safe one.
    """

    extreme: Literal["best", "worst"]
    n: int

    @property
    def label(self) -> str:
        """As the command line writes it."""
        return "standard" if self.n == 1 else f"{self.extreme}_of_n:{self.n}"


STANDARD = Chosen("best", 1)
"""One sample."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the gateway itself does when asked: every answer is drawn through it, nothing is simulated.

    Attributes:
        fields: Canonical JSON of the object behind `served:`.
    """

    fields: str

    @property
    def label(self) -> str:
        """As the command line writes it."""
        return f"served:{self.fields}"

    def body(self, reward: str) -> dict[str, Any]:
        """Fields of the request: `best_of` and `calibration` are its own, all else is its `selection`.

        With none of them the route's own settings hold, its reward too; else `reward` ranks.
        """
        fields: dict[str, Any] = json.loads(self.fields)
        selection = {name: value for name, value in fields.items() if name not in _BESIDE_SELECTION}
        body = {name: value for name, value in fields.items() if name in _BESIDE_SELECTION}
        if selection:
            body["selection"] = selection
        if body:
            body["reward"] = reward
        return body


Procedure = Chosen | Served


def parse_procedure(text: str) -> Procedure:
    """`standard`, `best_of_n:N`, `worst_of_n:N`, or `served:` and a JSON object.

    Raises:
        InvalidRequestError: It is none of these.
    """
    if text == "standard":
        return STANDARD
    if match := re.fullmatch(r"(best|worst)_of_n:([0-9]{1,4})", text):
        n = int(match[2])
        if not 1 <= n <= _MAX_N:
            raise InvalidRequestError(f"the procedure {text!r} must have an N from 1 to {_MAX_N}")
        return STANDARD if n == 1 else Chosen("best" if match[1] == "best" else "worst", n)
    if text.startswith("served:"):
        try:
            fields = json.loads(text.removeprefix("served:"))
        except ValueError as exc:
            raise InvalidRequestError(f"the procedure {text!r} is not JSON after 'served:': {exc}") from exc
        if isinstance(fields, dict):
            return Served(json.dumps(fields, sort_keys=True, separators=(",", ":")))
        raise InvalidRequestError(f"the procedure {text!r} needs a JSON object after 'served:'")
    raise InvalidRequestError(
        f"{text!r} is no procedure: write standard, best_of_n:N, worst_of_n:N or served:{{...}} with a JSON object"
    )
