"""Checkpoints from which a run goes on bit for bit: adapter, optimiser, random state, objective and counters.

A checkpoint is a directory `step-00000500`: `adapter/` (an ordinary model directory), `optimiser.pt`, `objective.npz`
and `state.json`, and `objective.safetensors` where the objective has weights of its own. It is written under a
temporary name, flushed and renamed, so a crash never leaves half of one. The same step written again (after a resume)
is `step-00000500.1`, and so on: the one before goes only when the new one is there.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab_adapters.contract.errors import ConflictError, IntegrityError, StorageError
from trimtab_training.config_section import ConfigSection
from trimtab_training.durable_files import sync_directory, sync_tree
from trimtab_training.learner import Learner
from trimtab_training.models import Vocabulary, save_causal_lm
from trimtab_training.objectives.objective import ObjectiveState

SCHEMA_VERSION = 2
_TENSORS = "objective.safetensors"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TEMPORARY = ".tmp-"
_MAY_CHANGE = (
    "output_dir",
    "gateway",
    "checkpoint",
    "evaluation.max_prompts",
    "evaluation.num_per_prompt",
    "evaluation.num_resamples",
    "evaluation.procedure",
    "evaluation.refusal_phrases",
    "evaluation.second_reward",
    "gate",
    "report",
    "publish",
    "log_every",
    "num_threads",
    "processes",
    "limits",
    "models.device",
)
"""Settings, by the beginning of their name, that do not change what is learned."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run must remember besides the learner.

    Attributes:
        next_round: Number of the next round of fresh rollouts; round n belongs to step n * interval.
        reward_version: Version of the reward behind the rollouts; None before the first score.
        parent: Adapter version that the run started from, if any.
        control_token_ids: As in `AdapterStart`.
        fixed_prefix: As in `AdapterStart`.
        spent_s: Seconds that the run took up to here, over all its attempts.
    """

    next_round: int
    reward_version: str | None
    parent: str | None
    control_token_ids: tuple[int, ...] = ()
    fixed_prefix: tuple[int, ...] = ()
    spent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk and its small part; `restore_learner` reads the rest."""

    path: Path
    step: int
    run: RunState

    @property
    def adapter_path(self) -> Path:
        """The adapter LM's model directory."""
        return self.path / "adapter"


def save_checkpoint(
    directory: Path, learner: Learner[Any], run: RunState, *, config: ConfigSection, vocabulary: Vocabulary, keep: int
) -> Path:
    """Write a checkpoint of the learner as it is now and delete all but the newest `keep`.

    Raises:
        WeightsError: A weight is NaN or infinite; the older checkpoints stay.
        StorageError: The disk refused.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        target = _new_name(directory, learner.step)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
        try:
            _write(temporary, learner, run, config, vocabulary)
            sync_tree(temporary)
            temporary.rename(target)
            sync_directory(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _delete_old(directory, target, keep=keep)
    except OSError as exc:
        raise StorageError(f"no checkpoint can be written to {directory}: {exc}") from exc
    return target


def _write(path: Path, learner: Learner[Any], run: RunState, config: ConfigSection, vocabulary: Vocabulary) -> None:
    save_causal_lm(learner.policy.adapter, path / "adapter", vocabulary.path)
    random_state = {"cpu": torch.get_rng_state()}
    if learner.policy.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(learner.policy.device)
    torch.save({"optimiser": learner.state(), "random": random_state}, path / "optimiser.pt")
    objective = learner.objective.state()
    np.savez(path / "objective.npz", allow_pickle=False, **objective.arrays)
    if objective.tensors:
        save_file({name: t.detach().cpu().contiguous() for name, t in objective.tensors.items()}, path / _TENSORS)
    state = {
        "schema_version": SCHEMA_VERSION,
        "step": learner.step,
        "next_round": run.next_round,
        "reward_version": run.reward_version,
        "parent": run.parent,
        "control_token_ids": run.control_token_ids,
        "fixed_prefix": run.fixed_prefix,
        "spent_s": run.spent_s,
        "objective": dict(objective.values),
        "config": config.model_dump(mode="json"),
    }
    (path / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _new_name(directory: Path, step: int) -> Path:
    """Where a checkpoint of this step goes: a name that is not taken and sorts behind those that are."""
    taken = [order for path in _directories(directory) if (order := _order(path))[0] == step]
    name = f"step-{step:08d}"
    return directory / (f"{name}.{taken[-1][1] + 1}" if taken else name)


def _delete_old(directory: Path, newest: Path, *, keep: int) -> None:
    """Delete what the newest checkpoint replaces, all but `keep`, and what a crash left half written."""
    step = _order(newest)[0]
    found = _directories(directory)
    replaced = [path for path in found if _order(path)[0] == step and path != newest]
    others = [path for path in found if path not in replaced]
    for old in (*replaced, *others[:-keep], *directory.glob(f"{_TEMPORARY}*")):
        shutil.rmtree(old)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint in a directory, if there is one."""
    found = _directories(directory)
    return found[-1] if found else None


def open_checkpoint(path: Path, config: ConfigSection) -> Checkpoint:
    """Read a checkpoint's state and make sure that it belongs to this run.

    Raises:
        IntegrityError: It cannot be read.
        ConflictError: It was written under another configuration, where that changes what is learned.
    """
    state = _read_state(path)
    before, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed := [key for key in changed if not key.startswith(_MAY_CHANGE)]:
        raise ConflictError(
            f"{path} was written with another configuration ({', '.join(changed)}); restore it or use a new output_dir"
        )
    return Checkpoint(
        path=path,
        step=int(state["step"]),
        run=RunState(
            int(state["next_round"]),
            state["reward_version"],
            state["parent"],
            tuple(state["control_token_ids"]),
            tuple(state["fixed_prefix"]),
            float(state.get("spent_s", 0.0)),
        ),
    )


def restore_learner(checkpoint: Checkpoint, learner: Learner[Any]) -> None:
    """Put objective, optimiser, step and torch's random state back; the adapter must already be the checkpoint's.

    Raises:
        IntegrityError: They cannot be read.
    """
    path = checkpoint.path
    try:
        with (path / "objective.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tensors = load_file(path / _TENSORS) if (path / _TENSORS).exists() else {}
            values = _read_state(path)["objective"]
            learner.objective.load_state(ObjectiveState(dict(arrays), values, tensors))
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, SafetensorError) as exc:
        raise IntegrityError(f"the objective of {path} cannot be read: {exc}") from exc
    try:
        saved: dict[str, Any] = torch.load(path / "optimiser.pt", map_location=learner.policy.device, weights_only=True)
        learner.load_state(saved["optimiser"], checkpoint.step)
        torch.set_rng_state(saved["random"]["cpu"].cpu())
        if "cuda" in saved["random"] and learner.policy.device.type == "cuda":
            torch.cuda.set_rng_state(saved["random"]["cuda"].cpu(), learner.policy.device)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError) as exc:
        raise IntegrityError(f"the optimiser of {path} cannot be read: {exc}") from exc


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = state["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise IntegrityError(f"{path} is not a readable checkpoint: {exc}") from exc
    if version != SCHEMA_VERSION:
        raise IntegrityError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}")
    return state


def _directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    """Step and how often it had been written before."""
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
