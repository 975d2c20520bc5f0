"""The rollouts of one round with what an objective computed for each, gone through a number of times."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_training.objectives.objective import ObjectiveState, ScoredRollout
from trimtab_training.ragged import pack_ragged, unpack_ragged

_IDS = ("prompt_token_ids", "output_token_ids")
_LOGPROBS = ("behaviour_logprobs", "base_logprobs")

Floats = NDArray[np.float64]


class RoundBuffer:
    """Rows in shuffled passes, without a row twice in a pass; empty and used up at first.

    Args:
        num_passes: How often each row is drawn.
        columns: Names of the numbers that belong to each row, one per row.
        token_columns: Names of the numbers that belong to each row, one per output token.
        seed: Of the order.
    """

    def __init__(
        self, num_passes: int, *, columns: Sequence[str] = (), token_columns: Sequence[str] = (), seed: int
    ) -> None:
        self.rollouts: list[ScoredRollout] = []
        self._num_passes = num_passes
        self._columns: dict[str, Floats] = {name: np.empty(0) for name in columns}
        self._token_columns: dict[str, list[Floats]] = {name: [] for name in token_columns}
        self._rng = np.random.default_rng(seed)
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._cursor = 0

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def is_used_up(self) -> bool:
        """Whether every row has been drawn as often as it is to be."""
        return self._cursor >= len(self._order)

    def column(self, name: str) -> Floats:
        """A number for each row, `[rows]`."""
        return self._columns[name]

    def token_column(self, name: str, rows: Sequence[int]) -> list[Floats]:
        """The numbers of some rows' output tokens, `[tokens]` each."""
        return [self._token_columns[name][row] for row in rows]

    def replace(
        self,
        rollouts: Sequence[ScoredRollout],
        columns: Mapping[str, Floats] | None = None,
        token_columns: Mapping[str, Sequence[Floats]] | None = None,
    ) -> None:
        """Begin a round; what the old one left is dropped.

        Args:
            rollouts: All with both log-probabilities.
            columns: `[rollouts]` for each name.
            token_columns: For each name and rollout `[output tokens]`.
        """
        columns, token_columns = columns or {}, token_columns or {}
        if columns.keys() != self._columns.keys() or any(len(c) != len(rollouts) for c in columns.values()):
            raise ValueError("a round needs one number per rollout for each of its columns")
        lengths = [len(rollout.output_token_ids) for rollout in rollouts]
        if token_columns.keys() != self._token_columns.keys() or any(
            [len(row) for row in column] != lengths for column in token_columns.values()
        ):
            raise ValueError("a round needs one number per output token for each of its token columns")
        self.rollouts = list(rollouts)
        self._columns = dict(columns)
        self._token_columns = {name: list(column) for name, column in token_columns.items()}
        passes = [self._rng.permutation(len(rollouts)) for _ in range(self._num_passes)]
        self._order = np.concatenate(passes).astype(np.int64) if passes else np.empty(0, dtype=np.int64)
        self._cursor = 0

    def draw(self, num_rows: int) -> list[int]:
        """The next rows' numbers, fewer at the end of a pass; none when the round is used up."""
        end_of_pass = (self._cursor // max(1, len(self)) + 1) * len(self)
        taken = self._order[self._cursor : min(self._cursor + num_rows, end_of_pass)]
        self._cursor += len(taken)
        return [int(row) for row in taken]

    def state(self) -> ObjectiveState:
        """Everything, for a checkpoint."""
        arrays: dict[str, NDArray[Any]] = {f"column_{name}": column for name, column in self._columns.items()}
        for name, column in self._token_columns.items():
            arrays[f"token_column_{name}"] = np.concatenate(column) if column else np.empty(0)
        for name in (*_IDS, *_LOGPROBS):
            rows = [getattr(rollout, name) for rollout in self.rollouts]
            arrays[name], arrays[f"{name}_lengths"] = pack_ragged(rows, np.int64 if name in _IDS else np.float64)
        arrays["rewards"] = np.array([rollout.reward for rollout in self.rollouts])
        arrays["groups"] = np.array([rollout.group for rollout in self.rollouts], dtype=np.int64)
        arrays["order"] = self._order
        values = {"cursor": self._cursor, "rng": json.dumps(self._rng.bit_generator.state)}
        return ObjectiveState(arrays=arrays, values=values)

    def load_state(self, state: ObjectiveState) -> None:
        """Go on from `state`."""
        arrays = state.arrays
        ragged = [unpack_ragged(arrays[name], arrays[f"{name}_lengths"]) for name in (*_IDS, *_LOGPROBS)]
        self.rollouts = [
            ScoredRollout(prompt, output, float(reward), int(group), behaviour, base)
            for prompt, output, behaviour, base, reward, group in zip(
                *ragged, arrays["rewards"], arrays["groups"], strict=True
            )
        ]
        self._columns = {name: np.asarray(arrays[f"column_{name}"], dtype=np.float64) for name in self._columns}
        ends = np.cumsum(arrays["output_token_ids_lengths"])[:-1]
        self._token_columns = {
            name: np.split(arrays[f"token_column_{name}"], ends) if self.rollouts else []
            for name in self._token_columns
        }
        self._order = np.asarray(arrays["order"], dtype=np.int64)
        self._cursor = int(state.values["cursor"])
        self._rng.bit_generator.state = json.loads(state.values["rng"])
