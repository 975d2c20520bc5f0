"""The scored log of a run that draws nothing: kept with the run, to be gone through again and again."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from trimtab_adapters.contract.errors import IntegrityError
from trimtab_training.durable_files import writing_whole
from trimtab_training.objectives.objective import ObjectiveState, ScoredRollout
from trimtab_training.objectives.round_buffer import RoundBuffer


def save_round(path: Path, rollouts: Sequence[ScoredRollout]) -> None:
    """Write rollouts that have both log-probabilities."""
    buffer = RoundBuffer(0, seed=0)
    buffer.replace(rollouts, {})
    with writing_whole(path) as file:
        np.savez(file, allow_pickle=False, **buffer.state().arrays)


def load_round(path: Path) -> list[ScoredRollout]:
    """Read what `save_round` wrote; nothing of it was drawn by the policy as it is now.

    Raises:
        IntegrityError: It cannot be read.
    """
    buffer = RoundBuffer(0, seed=0)
    values = {"cursor": 0, "rng": json.dumps(np.random.default_rng(0).bit_generator.state)}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            buffer.load_state(ObjectiveState(dict(arrays), values))
    except (OSError, ValueError, KeyError, BadZipFile) as exc:
        raise IntegrityError(f"the logged rollouts of the run in {path} cannot be read: {exc}") from exc
    return [replace(rollout, is_current=False) for rollout in buffer.rollouts]
