"""The recipe, from prompts to a student with its fidelity beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.cli import distill as command
from trimtab_training.distillation.building import built_teacher
from trimtab_training.distillation.config import DistillConfig
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.models import load_causal_lm
from trimtab_training.recipes.distill import DistillResult, distill
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer

MakeDistill = Callable[..., DistillConfig]


@pytest.fixture
def make_distill(tmp_path: Path, model_dirs: dict[str, Path], prompt_file: Path) -> MakeDistill:
    def make(**changes: Any) -> DistillConfig:
        data: dict[str, Any] = {
            "output_dir": str(tmp_path / "distill"),
            "student": str(model_dirs["adapter"]),
            "teacher": {"type": "local", "path": str(model_dirs["base"])},
            "prompts": {"path": str(prompt_file)},
            "num_per_prompt": 8,
            "sampling": {"max_tokens": 6},
            "optimiser": {"batch_size": 32, "lr": 1e-2},
            "held_out_share": 0.25,
            "steps": 60,
        }
        return DistillConfig.model_validate({**data, **changes})

    return make


def run(config: DistillConfig, **settings: Any) -> DistillResult:
    with built_teacher(config, Interruption()) as teacher:
        return distill(config, teacher, show_progress=False, **settings)


@pytest.mark.parametrize("top_logprobs", [0, 8])
def test_a_student_comes_closer_to_its_teacher_on_held_out_prompts(
    make_distill: MakeDistill, top_logprobs: int
) -> None:
    """Tested: the 95 % intervals before and after do not touch."""
    result = run(make_distill(top_logprobs=top_logprobs))
    assert result.after.interval[1] < result.before.interval[0]
    assert result.path is not None
    told = json.loads((result.path / "fidelity.json").read_text())
    assert told["log_ratio"] == result.after.log_ratio
    assert told["before"]["log_ratio"] == result.before.log_ratio
    assert told["objective"] == ("token" if top_logprobs else "sequence")


def test_an_interrupted_and_resumed_distillation_ends_with_the_same_weights(
    make_distill: MakeDistill, tmp_path: Path
) -> None:
    straight = run(make_distill(output_dir=str(tmp_path / "straight"), steps=6))
    config = make_distill(steps=6, checkpoint={"every": 4})

    class StopsAtFive(Interruption):
        calls = 0

        @override
        def check(self) -> None:
            self.calls += 1
            if self.calls == 6:
                self.request("released")
            super().check()

    with pytest.raises(TrainingInterrupted):
        run(config, interruption=StopsAtFive())
    assert (config.output_dir / "checkpoints/step-00000005").exists()
    with pytest.raises(ConflictError, match="resume"):
        run(config)
    resumed = run(config, resume=True)
    assert straight.path is not None
    assert resumed.path is not None
    weights = [load_causal_lm(p, dtype=torch.float32, device="cpu").state_dict() for p in (straight.path, resumed.path)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert resumed.after == straight.after


def test_without_steps_the_fidelity_of_what_is_there_is_measured(make_distill: MakeDistill) -> None:
    config = make_distill(steps=0)
    result = run(config)
    assert result.path is None
    assert result.after == result.before
    assert not (config.output_dir / "student").exists()


def test_a_version_that_was_trained_against_a_student_says_how_close_that_was(
    make_distill: MakeDistill, make_config: Any, lucky_scorer: Scorer
) -> None:
    student = run(make_distill(steps=2)).path
    assert student is not None
    result = train(make_config(models={"base_model": str(student)}, steps=1), scorer=lucky_scorer)
    told = read_manifest(Path(result.path)).training["approximate_policy"]
    assert told == json.loads((student / "fidelity.json").read_text())
    assert told["num_samples"] > 0


def test_the_command_prints_both_fidelities(
    make_distill: MakeDistill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_distill(steps=2)
    file = tmp_path / "distill.json"
    file.write_text(config.model_dump_json())
    assert command(["--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "start" in shown
    assert "student in" in shown
    assert command(["--config", str(file)]) == 1
    assert "resume" in capsys.readouterr().err
