"""What the first process of a run orders and the others do, so that all hold the same state at each step.

Only the first one draws, scores, decides and writes. The others load the same models from the same checkpoint and then
follow its orders, which travel by `Processes.from_first`, until the run ends or the first process is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab_training.checkpoint import Checkpoint
from trimtab_training.config import TrainConfig
from trimtab_training.models import load_vocabulary
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.processes import Processes
from trimtab_training.wiring import build_learner, cpu_threads


@dataclass(frozen=True, slots=True)
class Begin:
    """Load the models, from a checkpoint if there is one."""

    checkpoint: Checkpoint | None


@dataclass(frozen=True, slots=True)
class AddRollouts:
    """Give these to the objective."""

    rollouts: Sequence[ScoredRollout]


@dataclass(frozen=True, slots=True)
class TakeStep:
    """Take an optimiser step together."""


@dataclass(frozen=True, slots=True)
class End:
    """There are no more steps."""


Order = Begin | AddRollouts | TakeStep | End


def follow(config: TrainConfig, processes: Processes) -> None:
    """Do what the first process orders, until it ends the run.

    Raises:
        TrimtabError: The models cannot be loaded, the step diverged, or the first process is gone.
    """
    with cpu_threads(config.num_threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        begin = _next_order(processes)
        if not isinstance(begin, Begin):
            return
        learner, _ = build_learner(
            config, load_vocabulary(config.models.base_model), begin.checkpoint, processes=processes
        )
        while True:
            match _next_order(processes):
                case AddRollouts(rollouts):
                    learner.add_rollouts(rollouts)
                case TakeStep():
                    learner.train_step()
                case _:
                    return


def _next_order(processes: Processes) -> Order:
    order: Order = End()
    return processes.from_first(order)
