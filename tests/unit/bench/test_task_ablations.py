"""The ablations: gains are paired over prompts, and each part runs from data to table on tiny random models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.ablations import gain_row, main
from tasks.outcomes import Outcomes


def outcomes(judge: list[list[float]], reward: list[list[float]]) -> Outcomes:
    ones = np.ones((len(judge), len(judge[0])))
    scores = {"judge": np.array(judge), "reward": np.array(reward)}
    return Outcomes(scores, ones, 0.5 * ones, 3.0 * ones, [[(1, 2, 3)] * len(judge[0])] * len(judge))


def test_a_gain_is_the_mean_of_differences_of_each_prompt() -> None:
    """Prompts differ by much more than policies do: unpaired, the interval would hold 0."""
    base = outcomes([[0.1, 0.3], [0.9, 0.7], [0.4, 0.6]], [[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    better = outcomes([[0.3, 0.3], [0.9, 0.9], [0.6, 0.6]], [[0.1, 0.1], [1.1, 1.1], [0.6, 0.6]])
    row = gain_row(better, base, seed=0)
    assert row["judge_gain"] == pytest.approx([0.1, 0.1, 0.1])
    assert row["reward_gain"] == pytest.approx([0.1, 0.1, 0.1])
    assert (row["kl"], row["tokens"]) == (0.5, 3.0)


def rows_of(small_world: Path, *arguments: str) -> list[dict[str, Any]]:
    models = [f"--{kind}={small_world / name}" for kind, name in (("bases", "base"), ("starts", "start"))]
    settings = {"steps": 2, "num_prompts": 8, "num_samples": 3, "prompts_per_round": 8, "num_per_prompt": 2}
    settings |= {"batch_size": 8, "interval": 2}
    chosen = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    path = small_world / "result.json"
    data = f"--data={small_world / 'data'}"
    assert main([data, "--threads=1", *models, *chosen, f"--json={path}", *arguments]) == 0
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    assert all(row["judge_gain"][1] <= row["judge_gain"][0] <= row["judge_gain"][2] for row in rows)
    return rows


def test_objectives_learn_from_as_many_rollouts_each(small_world: Path) -> None:
    rows = rows_of(small_world, "--part=objectives", "--kinds=quark,quark-plain,ppo,nlpo,rloo")
    assert [row["objective"] for row in rows] == ["quark", "quark-plain", "ppo", "nlpo", "rloo"]
    assert {row["costs"]["rollouts"] for row in rows} == {16}
    assert len({row["kl"] for row in rows}) == 5


def test_sizes_are_every_adapter_on_every_base(small_world: Path) -> None:
    both = ",".join(str(small_world / name) for name in ("base", "start"))
    rows = rows_of(small_world, "--part=sizes", f"--bases={both}", f"--starts={both}")
    pairs = [("base", "base"), ("base", "start"), ("start", "base"), ("start", "start")]
    assert [(row["base"], row["adapter"]) for row in rows] == pairs
    assert all(row["step_cost"] > 0 for row in rows)


def test_what_stands_in_for_the_base_is_told_with_its_fidelity(small_world: Path) -> None:
    further = small_world / "start"
    rows = rows_of(small_world, "--part=approximate", f"--approximate={further}")
    names = ["the base", "smaller", "smaller, distilled", "random weights, distilled", str(further)]
    assert [row["trained_against"] for row in rows] == names
    same, smaller, distilled, random, again = (row["log_ratio"] for row in rows)
    assert same == pytest.approx(0.0, abs=1e-6)
    assert 0 < distilled < smaller
    assert random > 0
    assert again == smaller
