import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from logged_runs import gateway_config, logged
from trimtab_adapters.contract.errors import (
    ConflictError,
    EngineUnavailableError,
    InvalidRequestError,
    RewardError,
    WeightsError,
)
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.gateway import ScoreReply
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.recipes.train import train
from trimtab_training.rewards import Scorer


def metrics(config: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.fixture
def make_toy(make_config: Any, toy_dirs: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """A run over 16 tokens and 40 prompts, 10 of them held out. The reward is the share of token 7 in an output: about
    0.04 from the base."""
    prompts = tmp_path / "toy.jsonl"
    texts = [f"t{1 + i % 15} t{1 + 7 * i % 15} t{1 + i // 5}" for i in range(40)]
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))

    def make(*, fresh: dict[str, Any], optimiser: dict[str, Any], **changes: Any) -> Any:
        return make_config(
            models={name: str(path) for name, path in toy_dirs.items()},
            prompts={"type": "file", "path": str(prompts)},
            fresh={"interval": 20, **fresh},
            sampling={"max_tokens": 8},
            optimiser={"lr": 2e-2, "decay": "none", **optimiser},
            evaluation={"share": 0.25, "num_per_prompt": 16},
            **changes,
        )

    return make


def test_training_raises_the_share_of_a_token(make_toy: Any, lucky_scorer: Scorer) -> None:
    """Tested: on held-out prompts the 95 % bootstrap interval of the difference to the base lies above 0.02. Over seeds
    0 to 19 its lower end was between 0.058 and 0.299, and without learning (learning rate 1e-9) between -0.058 and
    -0.007: odds of a false alarm or a false pass are below 1 in 20 for a random seed, and the seed is fixed.
    """
    config = make_toy(
        fresh={"num_per_prompt": 16},
        objective={"kl_coef": 0.0, "entropy_coef": 0.0},
        optimiser={"batch_size": 64},
        steps=80,
    )
    result = train(config, scorer=lucky_scorer)
    low, high = result.evaluation["reward_difference_interval"]
    assert low > 0.02
    assert low < result.evaluation["reward_difference"] < high
    assert result.evaluation["win_rate"] > 0.5
    rounds = [line["rollouts/mean_reward"] for line in metrics(config) if "rollouts/mean_reward" in line]
    assert len(rounds) == 4
    assert rounds[-1] > rounds[0]
    manifest = read_manifest(Path(result.path))
    assert manifest.version_id == result.version
    assert manifest.evaluation == json.loads(json.dumps(result.evaluation))
    assert manifest.reward == "lucky@1"
    assert manifest.prefix_token_ids == [16]
    assert manifest.training["control_token_ids"] == [16, 17, 18, 19, 20]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"fresh": {"num_per_prompt": 4}, "objective": {"kind": "rloo", "kl_coef": 0.0}, "steps": 8}, id="rloo"
        ),
        pytest.param(
            {
                "fresh": {"num_per_prompt": 4},
                "objective": {"kind": "ppo", "kl_coef": 0.0, "epochs": 4},
                "steps": 32,
            },
            id="ppo",
        ),
        pytest.param(
            {
                "fresh": {"num_per_prompt": 4},
                "objective": {
                    "kind": "nlpo",
                    "kl_coef": 0.0,
                    "epochs": 4,
                    "mask_min_tokens": 4,
                    "mask_interval": 2,
                },
                "steps": 32,
            },
            id="nlpo",
        ),
        pytest.param(
            {
                "fresh": {"num_per_prompt": 8, "interval": 10},
                "objective": {"kind": "bonbon", "n": 8},
                "optimiser": {"batch_size": 24},
                "steps": 20,
            },
            id="bonbon",
        ),
    ],
)
def test_every_objective_raises_the_share_of_a_token(
    make_toy: Any, lucky_scorer: Scorer, changes: dict[str, Any]
) -> None:
    """Each learns from 384 rollouts. Tested as above: the interval of the difference to the base lies above 0.02.

    Over seeds 0 to 19 its lower end was at least 0.226 (RLOO), 0.140 (PPO), 0.187 (NLPO) and 0.115 (BoNBoN), and
    at most -0.010 without learning (learning rate 1e-9): odds of a false alarm or a false pass below 1 in 20 for a
    random seed, and the seed is fixed.
    """
    fresh = {"prompts_per_round": 24, **changes["fresh"]}
    config = make_toy(**{"optimiser": {"batch_size": 48}, **changes, "fresh": fresh})
    result = train(config, scorer=lucky_scorer)
    assert result.evaluation["reward_difference_interval"][0] > 0.02
    rounds = [line for line in metrics(config) if "rollouts/mean_reward" in line]
    assert len(rounds) * 24 * config.fresh.num_per_prompt == 384


def test_bonbon_draws_every_round_from_the_base(make_config: Any, gateway: Any) -> None:
    config = gateway_config(
        make_config,
        objective={"kind": "bonbon", "n": 3},
        fresh={"num_per_prompt": 3, "interval": 4, "source": "gateway", "model": "tiny", "prompts_per_round": 4},
        logged={"enabled": False},
    )
    with gateway.client() as client:
        train(config, gateway=client)
    in_training = gateway.bodies("/v1/completions")[:12]  # the rounds of steps 0, 4 and 8
    assert [body["steering"]["adapters"] for body in in_training] == [[]] * 12
    assert [body["n"] for body in in_training] == [3] * 12
    assert len({body["seed"] for body in in_training}) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "objective": {"kind": "rloo"},
            "fresh": {"num_per_prompt": 2},
            "reward": {"transform": {"kind": "one_step", "n": 4, "num_reference": 3}},
        },
        {
            "objective": {"kind": "ppo", "epochs": 2, "kl_target": 0.1},
            "fresh": {"num_per_prompt": 2, "prompts_per_round": 8},
        },
        {
            "objective": {"kind": "nlpo", "epochs": 2, "mask_min_tokens": 3, "mask_interval": 1},
            "fresh": {"num_per_prompt": 2, "prompts_per_round": 8},
            "optimiser": {"lr": 1e-2},
        },
        {
            "objective": {"kind": "nlpo", "epochs": 1, "mask_min_tokens": 3, "mask_interval": 1},
            "fresh": {"num_per_prompt": 2, "prompts_per_round": 8},
            "models": {"lora": {"r": 2}, "gradient_checkpointing": True},
            "optimiser": {"lr": 1e-2},
        },
        {"objective": {"kind": "bonbon", "n": 4}, "fresh": {"num_per_prompt": 4}},
    ],
    ids=["quark", "rloo-ctrl", "ppo", "nlpo", "nlpo-lora", "bonbon"],
)
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(
    make_config: Any, lucky_scorer: Scorer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Stopped after 7 of 10 steps, between the rounds of steps 5 and 10 or, with 4 steps a round, in the middle of the
    second one; and again right after that."""
    straight = make_config(output_dir=str(tmp_path / "straight"), **changes)
    expected = train(straight, scorer=lucky_scorer)
    config = make_config(**changes)
    for stop_at in (7, 9):
        interruption = Interruption()

        def report(progress: Any, stop_at: int = stop_at, interruption: Interruption = interruption) -> None:
            if progress["step"] == stop_at:
                interruption.request("released")

        with pytest.raises(TrainingInterrupted) as stopped:
            train(config, scorer=lucky_scorer, interruption=interruption, report=report, resume=True)
        assert stopped.value.reason == "released"
        assert (config.output_dir / f"checkpoints/step-0000000{stop_at}").exists()
    result = train(config, scorer=lucky_scorer, resume=True)
    assert result.num_steps == 10
    assert weights(Path(result.path)) == weights(Path(expected.path))
    assert result.evaluation == expected.evaluation
    steps = [line["step"] for line in metrics(config) if "train/loss" in line]
    assert steps == list(range(1, 11))


def test_a_resumed_run_keeps_the_transform_that_it_began_with(make_config: Any, gateway: Any) -> None:
    """The route serves one sample at first and the best of four when the run goes on."""
    gateway.rollouts = logged(40)
    gateway.routes["kind"] = {"best_of": 1}
    config = gateway_config(make_config, evaluation={"share": 0.0})
    interruption = Interruption()

    def report(progress: Any) -> None:
        if progress["step"] == 7:
            interruption.request("released")

    with gateway.client() as client:
        with pytest.raises(TrainingInterrupted):
            train(config, gateway=client, interruption=interruption, report=report)
        gateway.routes["kind"] = {"best_of": 4}
        result = train(config, gateway=client, resume=True)
    assert read_manifest(Path(result.path)).training["reward_transform"] == {"kind": "raw"}


def test_the_callers_random_state_and_threads_are_left_alone(make_config: Any, lucky_scorer: Scorer) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train(make_config(steps=1, num_threads=threads + 1), scorer=lucky_scorer)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_directory_with_a_run_is_not_overwritten(make_config: Any, lucky_scorer: Scorer) -> None:
    config = make_config(steps=1)
    train(config, scorer=lucky_scorer)
    with pytest.raises(ConflictError, match="resume"):
        train(config, scorer=lucky_scorer)


def test_divergence_ends_the_run_with_the_last_good_weights(make_config: Any, lucky_scorer: Scorer) -> None:
    config = make_config(optimiser={"lr": 1e30, "decay": "none"}, checkpoint={"every": 1})
    with pytest.raises(WeightsError, match=r"diverged|NaN"):
        train(config, scorer=lucky_scorer)
    assert not (config.output_dir / "versions").exists()


def test_a_failing_reward_ends_the_run_and_adds_nothing(make_config: Any) -> None:
    class Failing:
        name = "lucky"

        def score(self, inputs: Any) -> ScoreReply:
            raise RewardError("the reward is down")

    config = make_config()
    with pytest.raises(RewardError, match="down"):
        train(config, scorer=Failing())
    assert not (config.output_dir / "checkpoints").exists()


def test_the_whole_loop_runs_through_a_gateway(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    config = gateway_config(make_config)
    progress: list[Any] = []
    with gateway.client() as client:
        result = train(config, gateway=client, report=progress.append)
    # The log gave enough, so round 0 was not drawn. Round 1 (step 5) and the evaluation each drew with a version in the
    # making, which was retired and never had the adapter's own name; then the result was registered and activated.
    registered = list(gateway.versions.items())
    assert [manifest.name for _, manifest in registered] == ["lucky.training", "lucky.training", "lucky"]
    assert gateway.retired == [version for version, _ in registered[:2]]
    assert registered[2][0] == result.version
    assert [manifest.training["step"] for _, manifest in registered] == [5, 10, 10]
    assert gateway.routes == {"kind": {"adapter": "lucky", "version": result.version, "alpha": 1.0}}
    assert (result.is_registered, result.activated_route) == (True, "kind")
    steered = [bool(body["steering"]["adapters"]) for body in gateway.bodies("/v1/completions")]
    num_held_out = len(json.loads((config.output_dir / "prompts.json").read_text())["held_out"])
    assert steered == [True] * 4 + [False] * num_held_out + [True] * num_held_out
    assert result.evaluation["num_prompts"] == num_held_out
    assert list((config.output_dir / "intermediate").iterdir()) == []
    assert progress[-1] == {"phase": "publishing", "step": 10, "num_steps": 10}
    json.dumps(progress)


def test_the_base_draws_the_first_round_when_the_log_is_short(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(3)
    fresh = {"source": "gateway", "model": "tiny", "min_pool_size": 9, "interval": 50}
    with gateway.client() as client:
        train(gateway_config(make_config, fresh=fresh), gateway=client)
    in_training = gateway.bodies("/v1/completions")[:4]
    assert [body["steering"]["adapters"] for body in in_training] == [[]] * 4


def test_held_out_prompts_never_enter_the_pool(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)  # of 20 different prompts
    config = gateway_config(make_config, prompts={"type": "log"}, fresh={"model": "tiny", "interval": 0})
    with gateway.client() as client:
        train(config, gateway=client)
    split = json.loads((config.output_dir / "prompts.json").read_text())
    assert len(split["train"]) + len(split["held_out"]) == 20
    assert split["held_out"]
    (checkpoint,) = (config.output_dir / "checkpoints").iterdir()
    with np.load(checkpoint / "objective.npz") as pool:
        seen = set(pool["prompt_ids"].tolist())
    assert seen == {token for prompt in split["train"] for token in prompt["token_ids"]}


def test_a_version_that_is_no_better_is_published_but_not_activated(
    make_config: Any, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The gateway's outputs are noise of one distribution for base and steered."""
    gateway.rollouts = logged(40)
    with gateway.client() as client:
        result = train(gateway_config(make_config, publish={"name": "lucky", "route": "kind"}), gateway=client)
    low, high = result.evaluation["reward_difference_interval"]
    assert low <= 0 <= high
    assert result.is_registered
    assert result.activated_route is None
    assert gateway.routes == {}
    assert result.evaluation["gate"]["passed"] is False
    assert [found["signature"] for found in result.evaluation["diagnoses"]] == ["no_improvement"]
    assert "has not passed the gate, the route kind stays: the lower end" in caplog.text


def test_an_empty_log_without_fresh_rollouts_is_refused(make_config: Any, gateway: Any) -> None:
    config = gateway_config(make_config, fresh={"source": "gateway", "model": "tiny", "interval": 0})
    with gateway.client() as client, pytest.raises(InvalidRequestError, match="nothing to learn from"):
        train(config, gateway=client)


def test_a_gateway_that_went_away_leaves_a_run_that_can_be_resumed(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    config = gateway_config(make_config, checkpoint={"every": 2})

    def go_away(path: str) -> None:
        if path == "/v1/completions":
            gateway.answers = [httpx.ConnectError("gone")] * 99

    gateway.on_request = go_away
    with gateway.client() as client, pytest.raises(EngineUnavailableError):
        train(config, gateway=client)
    gateway.on_request, gateway.answers = (lambda path: None), []
    with gateway.client() as client:
        result = train(config, gateway=client, resume=True)
    assert result.num_steps == 10
    assert len(gateway.bodies("/admin/rollouts/export")) == 1


def test_rollouts_that_the_models_cannot_read_are_left_out(
    make_config: Any, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    too_long = logged(1, id="long", request_id="long", output_token_ids=[7] * 130)
    unknown = logged(1, id="unknown", request_id="unknown", output_token_ids=[99])
    gateway.rollouts = [*too_long, *unknown, *logged(20)]
    with gateway.client() as client:
        train(gateway_config(make_config, steps=1, evaluation={"share": 0.0}), gateway=client)
    assert "2 of 22 rollouts are empty, too long or hold unknown tokens" in caplog.text
