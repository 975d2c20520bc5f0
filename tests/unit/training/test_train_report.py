"""How a run ends: its report, the gate, and what becomes of the route."""

import json
from pathlib import Path
from typing import Any

import pytest

from logged_runs import gateway_config, logged
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer


def test_a_run_ends_with_a_report_and_the_gates_decision(make_config: Any, lucky_scorer: Scorer) -> None:
    config = make_config(
        evaluation={"procedure": "best_of_n:2"},
        gate={"max_perplexity_ratio": 1e-6},
        report={"plots": True, "show_samples": True, "num_samples": 2},
    )
    result = train(config, scorer=lucky_scorer)
    files = {path.name for path in (config.output_dir / "report").iterdir()}
    assert files == {"report.html", "report.json", "history.png", "win_rate.png", "lengths.png"}
    data = json.loads((config.output_dir / "report/report.json").read_text())
    assert (data["version"], data["reward"], data["num_steps"]) == (result.version, "lucky@1", 10)
    assert data["gate"] == result.evaluation["gate"] == read_manifest(Path(result.path)).evaluation["gate"]
    assert any("max_perplexity_ratio" in reason for reason in data["gate"]["reasons"])
    assert data["evaluation"]["procedure"] == "best_of_n:2"
    assert data["evaluation"]["num_per_prompt"] == 3
    assert data["history"]["train/loss"]["steps"] == list(range(1, 11))
    assert "samples" not in data
    page = (config.output_dir / "report/report.html").read_text()
    held_out = json.loads((config.output_dir / "prompts.json").read_text())["held_out"]
    assert sum(f"<td>{prompt['text']}</td>" in page for prompt in held_out) == 2


def test_a_run_that_holds_nothing_out_does_not_pass_the_gate(make_config: Any, lucky_scorer: Scorer) -> None:
    config = make_config(steps=1, evaluation={"share": 0.0})
    result = train(config, scorer=lucky_scorer)
    assert result.evaluation["gate"]["passed"] is False
    assert "base" not in result.evaluation
    assert (config.output_dir / "report/report.html").exists()


def test_the_win_rate_is_under_the_best_of_n_that_the_route_serves(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    gateway.routes["kind"] = {"best_of": 3}
    config = gateway_config(make_config, steps=1, reward={"source": "gateway", "transform": {"kind": "raw"}})
    with gateway.client() as client:
        result = train(config, gateway=client)
    assert result.evaluation["procedure"] == "best_of_n:3"
    assert result.evaluation["num_per_prompt"] == 4


def test_without_a_route_the_win_rate_is_under_what_the_transform_is_made_for(
    make_config: Any, lucky_scorer: Scorer
) -> None:
    transform = {"kind": "one_step", "n": 3, "procedure": "worst_of_n", "num_reference": 2}
    result = train(make_config(steps=1, reward={"transform": transform}), scorer=lucky_scorer)
    assert result.evaluation["procedure"] == "worst_of_n:3"


def test_a_second_reward_is_scored_and_watched_by_the_gate(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    config = gateway_config(
        make_config,
        steps=1,
        evaluation={"second_reward": {"name": "judge"}},
        gate={"min_second_reward_difference": 99.0},
    )
    with gateway.client() as client:
        result = train(config, gateway=client)
    assert len(gateway.bodies("/admin/rewards/judge/score")) == 2
    # The fake gateway's rewards are all one function.
    assert result.evaluation["second_reward_difference"] == result.evaluation["reward_difference"]
    assert result.evaluation["base"]["reward_correlation"] == pytest.approx(1.0)
    assert any("min_second_reward_difference" in reason for reason in result.evaluation["gate"]["reasons"])


def passing() -> dict[str, Any]:
    """A gate that noise passes."""
    off = ("min_reward_difference", "max_perplexity_ratio", "min_distinct_2_ratio", "max_length_ratio")
    return {**dict.fromkeys(off, "off"), "min_length_ratio": "off", "refused_signatures": []}


def test_a_version_that_passed_takes_a_share_of_its_route_first(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    gateway.routes["kind"] = {"best_of": 1}
    publish = {"name": "lucky", "route": "kind", "canary_percent": 5}
    config = gateway_config(make_config, steps=1, publish={**publish, "require_gate": True}, gate=passing())
    with gateway.client() as client:
        result = train(config, gateway=client)
    assert (result.activated_route, result.is_canary) == ("kind", True)
    assert gateway.bodies("/admin/routes/kind/promote") == [
        {"adapter": "lucky", "version": result.version, "alpha": 1.0, "percent": 5.0, "force": False}
    ]
    assert gateway.bodies("/admin/routes/kind/activate") == []


def test_a_route_that_is_new_takes_the_version_at_once(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    publish = {"name": "lucky", "route": "kind", "canary_percent": 5, "require_gate": False}
    with gateway.client() as client:
        result = train(gateway_config(make_config, steps=1, publish=publish), gateway=client)
    assert (result.activated_route, result.is_canary) == ("kind", False)
    assert gateway.bodies("/admin/routes/kind/promote")[0]["force"] is True
    assert len(gateway.bodies("/admin/routes/kind/activate")) == 1
