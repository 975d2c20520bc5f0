"""Runs in two processes. The second one is forked where its start is not what is tested, which saves it the imports."""

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab_adapters.contract.errors import ProcessLostError
from trimtab_training.accelerate_processes import AccelerateProcesses, joined
from trimtab_training.config import TrainConfig
from trimtab_training.follower_process import on_own_device
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.orders import follow
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "quark": {},
    "rloo": {"objective": {"kind": "rloo", "epochs": 2}, "fresh": {"num_per_prompt": 2, "prompts_per_round": 7}},
    "vbon": {
        "objective": {"kind": "vbon"},
        "fresh": {"num_per_prompt": 2, "prompts_per_round": 7},
        "reward": {"transform": {"kind": "log", "num_reference": 3}},
    },
    "ppo": {
        "objective": {"kind": "ppo", "epochs": 2, "kl_target": 0.1},
        "fresh": {"num_per_prompt": 2, "prompts_per_round": 5},
    },
    "nlpo": {
        "objective": {"kind": "nlpo", "epochs": 2, "mask_min_tokens": 3, "mask_interval": 1},
        "fresh": {"num_per_prompt": 2, "prompts_per_round": 5},
    },
    "bonbon": {"objective": {"kind": "bonbon", "n": 4}, "fresh": {"num_per_prompt": 4}},
}


@contextmanager
def two(tmp_path: Path, second: Callable[[AccelerateProcesses], None]) -> Any:
    """This process as the first of two; the other one runs `second`. Gives the processes and the other one."""
    rendezvous = tmp_path / f"rendezvous-{time.monotonic_ns()}"

    def run() -> None:
        with joined(rank=1, num=2, rendezvous=rendezvous, device="cpu") as processes:
            second(processes)

    other = multiprocessing.get_context("fork").Process(target=run)
    other.start()
    try:
        with joined(rank=0, num=2, rendezvous=rendezvous, device="cpu") as processes:
            yield processes, other
    finally:
        other.join(30)
        other.kill()
        other.join()


def test_figures_and_tensors_are_added_up_and_values_come_from_the_first(tmp_path: Path) -> None:
    def second(processes: AccelerateProcesses) -> None:
        assert (processes.rank, processes.num) == (1, 2)
        assert processes.from_first({"mine": 1}) == {"rank": 0}
        assert processes.add_up({"b": 2.0, "c": 0.125}) == {"a": 1.0, "b": 2.5, "c": 0.125}
        tensors = [torch.full((2, 3), 10.0), torch.tensor([20.0])]
        processes.add_up_tensors(tensors)
        processes.from_first([tensor.tolist() for tensor in tensors])  # what it got is checked by the first, below
        assert torch.equal(tensors[0], torch.full((2, 3), 11.0))

    with two(tmp_path, second) as (processes, other):
        assert (processes.rank, processes.num) == (0, 2)
        assert processes.from_first({"rank": 0}) == {"rank": 0}
        assert processes.add_up({"a": 1.0, "b": 0.5}) == {"a": 1.0, "b": 2.5, "c": 0.125}
        tensors = [torch.ones(2, 3), torch.tensor([2.0])]
        processes.add_up_tensors(tensors)
        assert torch.equal(tensors[0], torch.full((2, 3), 11.0))
        assert torch.equal(tensors[1], torch.tensor([22.0]))
        processes.from_first(None)
    assert other.exitcode == 0


def test_the_environment_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    with two(tmp_path, lambda processes: processes.from_first(None)) as (processes, _):
        assert os.environ["WORLD_SIZE"] == "2"
        processes.from_first(None)
    assert dict(os.environ) == before


def test_a_group_that_was_not_joined_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with (
        pytest.raises(ProcessLostError),
        joined(rank=0, num=2, rendezvous=tmp_path / "directory", device="cpu"),
    ):
        pytest.fail("nobody was there")
    with two(tmp_path, lambda processes: processes.from_first(None)) as (processes, _):
        assert processes.from_first(3) == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_end_with_the_weights_of_one(
    objective: str, make_config: Any, lucky_scorer: Scorer, tmp_path: Path
) -> None:
    """Sums over rows in another order differ in their last bits, about 1e-7 of a gradient.

    Ten Adam steps of 1e-3 move the weights by 5e-3. Gradients near Adam's epsilon of 1e-5 let such bits change that by
    some 1e-6; a two-hundredth of the way is allowed. Rows left out or counted twice change a good part of it.
    """
    settings = {"optimiser": {"batch_size": 3, "grad_accumulation": 2}, "evaluation": {"share": 0.0}}
    alone = make_config(output_dir=str(tmp_path / "alone"), **settings, **OBJECTIVES[objective])
    start = load_file(alone.models.adapter / "model.safetensors")
    expected = load_file(Path(train(alone, scorer=lucky_scorer).path) / "model.safetensors")
    shared = make_config(processes=2, **settings, **OBJECTIVES[objective])
    with two(tmp_path, lambda processes: follow(shared, processes)) as (processes, other):
        result = train(shared, scorer=lucky_scorer, processes=processes)
    assert other.exitcode == 0
    found = load_file(Path(result.path) / "model.safetensors")
    moved = max(float((expected[name][: len(start[name])] - start[name]).abs().max()) for name in start)
    off = max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())
    assert moved > 2e-3
    assert off < moved / 200


def test_a_run_in_two_processes_is_interrupted_and_resumed_in_one_or_two(
    make_config: Any, lucky_scorer: Scorer, tmp_path: Path
) -> None:
    """Alone from step 4 on the bits differ; see above for the tolerance."""
    settings = {"objective": {"kind": "rloo"}, "fresh": {"num_per_prompt": 2}, "evaluation": {"share": 0.0}}
    straight = train(make_config(output_dir=str(tmp_path / "straight"), **settings), scorer=lucky_scorer)
    config = make_config(processes=2, **settings)
    for stop_at in (4, 7):
        interruption = Interruption()

        def report(progress: Any, stop_at: int = stop_at, interruption: Interruption = interruption) -> None:
            if progress["step"] == stop_at:
                interruption.request("released")

        with (
            pytest.raises(TrainingInterrupted),
            two(tmp_path, follow_to_the_end(config)) as (processes, _),
        ):
            train(
                config,
                scorer=lucky_scorer,
                processes=processes,
                interruption=interruption,
                report=report,
                resume=True,
            )
    result = train(make_config(**settings), scorer=lucky_scorer, resume=True)
    found, expected = (load_file(Path(run.path) / "model.safetensors") for run in (result, straight))
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 2.5e-5


def follow_to_the_end(config: TrainConfig) -> Callable[[AccelerateProcesses], None]:
    """As `follower_process` does: the first one is gone when it was interrupted."""

    def second(processes: AccelerateProcesses) -> None:
        with pytest.raises(ProcessLostError):
            follow(config, processes)

    return second


def test_a_second_process_that_is_killed_ends_the_run_with_an_error(
    make_config: Any, lucky_scorer: Scorer, tmp_path: Path
) -> None:
    config = make_config(processes=2, steps=100_000, checkpoint={"every": 2})
    with two(tmp_path, lambda processes: follow(config, processes)) as (processes, other):

        def report(progress: Any) -> None:
            if progress["step"] == 5:
                other.kill()
                other.join()

        with pytest.raises(ProcessLostError):
            train(config, scorer=lucky_scorer, processes=processes, report=report)
    kept = sorted(path.name for path in (config.output_dir / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


def test_each_process_has_a_gpu_of_its_own(make_config: Any) -> None:
    assert on_own_device(make_config(models={"device": "cuda"}), 2).models.device == "cuda:2"
    assert on_own_device(make_config(models={"device": "cpu"}), 2).models.device == "cpu"
