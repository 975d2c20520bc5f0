"""What a run learns from the log: which rollouts, with what rewards, told in its metrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.prompts import is_held_out
from trimtab_training.recipes.train import train


def candidates(request: str, prompt: str, outputs: list[str], **fields: Any) -> list[dict[str, Any]]:
    """All candidates of one request, fairly drawn; log-probabilities are -1 under the policy and -2 under the base."""
    return [
        {
            "id": f"{request}-{index}",
            "request_id": request,
            "created_at": 0.0,
            "duration_s": 0.1,
            "route": "tiny",
            "base_model": "tiny",
            "endpoint": "completions",
            "prompt": prompt,
            "prompt_token_ids": [int(word[1:]) for word in prompt.split()],
            "output_text": output,
            "output_token_ids": [int(word[1:]) for word in output.split()],
            "steering": [],
            "sampling": {"temperature": 1.0},
            "steered_logprobs": [-1.0] * len(output.split()),
            "base_logprobs": [-2.0] * len(output.split()),
            "candidate_index": index,
            "num_candidates": len(outputs),
            "chosen": index == 0,
            "finish_reason": "stop",
            **fields,
        }
        for index, output in enumerate(outputs)
    ]


def lines(*groups: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(rollout) for group in groups for rollout in group]


def said(*ratings: float | None) -> list[dict[str, Any]]:
    return [{"rating": rating, "comment": "x", "created_at": 0.0, "updated_at": 0.0} for rating in ratings]


def log_figures(config: Any) -> dict[str, float]:
    for line in (config.output_dir / "metrics.jsonl").read_text().splitlines():
        if "log/num_read" in line:
            found = {name.removeprefix("log/"): value for name, value in json.loads(line).items() if "log/" in name}
            return {name: value for name, value in found.items() if name.startswith(("num_read", "num_used", "left"))}
    raise AssertionError("nothing was said of the log")


def objective_arrays(config: Any, step: int) -> dict[str, Any]:
    with np.load(config.output_dir / f"checkpoints/step-{step:08d}/objective.npz") as arrays:
        return dict(arrays)


def through_gateway(make_config: Any, **changes: Any) -> Any:
    sections = {
        "gateway": {"url": "http://gateway"},
        "reward": {"source": "gateway"},
        "fresh": {"source": "gateway", "model": "tiny", "prompts_per_round": 4, "num_per_prompt": 2},
        "logged": {"enabled": True},
        "sampling": {"max_tokens": 4},
        "evaluation": {"share": 0.0},
        "optimiser": {"batch_size": 4},
        "steps": 4,
        "checkpoint": {"every": 1, "keep": 9},
    }
    return make_config(**{**sections, **changes})


FAIR = [candidates(f"fair{i}", f"t{10 + i}", ["t7 t8", "t9", "t7"]) for i in range(2)]


def test_an_objective_of_the_newest_round_learns_from_the_log_first_and_then_from_fresh_rollouts(
    make_config: Any, gateway: Any
) -> None:
    """8 logged rows are 2 steps of 4 rows; the round of 4 prompts and 2 outputs comes after them.

    Two outputs of `again` are there already, by chance: they count once more, as they should for a mean.
    """
    again = candidates("again", "t10", ["t9", "t7"])
    cold = candidates("cold", "t12", ["t7", "t9"], sampling={"temperature": 0.5})
    silent = candidates("silent", "t13", ["t7", "t9"])
    silent[1]["steered_logprobs"] = None  # one of two: then none of them
    winner = candidates("winner", "t14", ["t7", "t9"])[:1]
    gateway.rollouts = lines(*FAIR, again, cold, silent, winner)
    config = through_gateway(make_config, objective={"kind": "rloo"})
    drawn_at: list[int] = []

    def note(path: str) -> None:
        if path == "/v1/completions":
            drawn_at.append(len(list((config.output_dir / "checkpoints").glob("step-*"))))

    gateway.on_request = note
    with gateway.client() as client:
        train(config, gateway=client)
    assert log_figures(config) == {
        "num_read": 13.0,
        "num_used": 8.0,
        "left_out/sampling_temperature": 2.0,
        "left_out/no_logprobs": 2.0,
        "left_out/partial_request": 1.0,
    }
    first = objective_arrays(config, 1)
    assert sorted(first["prompt_token_ids"].tolist()) == [10] * 5 + [11] * 3
    assert set(first["behaviour_logprobs"].tolist()) == {-1.0}
    assert set(first["base_logprobs"].tolist()) == {-2.0}
    assert drawn_at == [2] * 4  # after two steps, one request for each prompt
    assert len(objective_arrays(config, 3)["rewards"]) == 8


def test_a_pool_takes_what_a_round_cannot_but_no_part_of_a_request(make_config: Any, gateway: Any) -> None:
    cold = candidates("cold", "t12", ["t7", "t9"], sampling={"temperature": 0.5})
    winner = candidates("winner", "t14", ["t7", "t9"])[:1]
    again = candidates("again", "t10", ["t9", "t9 t9"])
    gateway.rollouts = lines(*FAIR, cold, winner, again)
    with gateway.client() as client:
        config = through_gateway(make_config, fresh={"source": "gateway", "model": "tiny", "interval": 0})
        train(config, gateway=client)
    assert log_figures(config) == {
        "num_read": 11.0,
        "num_used": 9.0,
        "left_out/partial_request": 1.0,
        "left_out/repeated": 1.0,
    }
    assert set(objective_arrays(config, 1)["prompt_ids"].tolist()) == {10, 11, 12}
    assert gateway.bodies("/v1/completions") == []


def test_chosen_only_leaves_requests_whose_candidates_were_all_returned(make_config: Any, gateway: Any) -> None:
    all_returned = candidates("all", "t12", ["t7", "t9"], chosen=True)
    gateway.rollouts = lines(*FAIR, all_returned)
    config = through_gateway(
        make_config,
        logged={"enabled": True, "chosen_only": True},
        fresh={"source": "gateway", "model": "tiny", "interval": 0},
    )
    with gateway.client() as client:
        train(config, gateway=client)
    assert log_figures(config) == {"num_read": 4.0, "num_used": 2.0, "left_out/partial_request": 2.0}


def write_log(path: Path, *groups: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(lines(*groups)) + "\n")
    return path


def test_a_run_on_files_alone_goes_through_them_again_and_needs_no_gateway(
    make_config: Any, lucky_scorer: Any, tmp_path: Path
) -> None:
    """6 rows are 2 steps; the run takes 5. Interrupted after the 3rd and resumed, it ends with the same weights."""
    log = write_log(tmp_path / "log.jsonl", *FAIR)

    def config(name: str) -> Any:
        return make_config(
            output_dir=str(tmp_path / name),
            objective={"kind": "rloo"},
            logged={"enabled": True, "path": str(log)},
            prompts={"type": "log"},
            fresh={"source": "local", "interval": 0, "num_per_prompt": 2},
            evaluation={"share": 0.0},
            optimiser={"batch_size": 4},
            steps=5,
            checkpoint={"every": 1, "keep": 9},
        )

    straight = train(config("straight"), scorer=lucky_scorer)
    for step in range(1, 6):
        assert len(objective_arrays(config("straight"), step)["rewards"]) == 6
    interruption = Interruption()

    def stop(progress: Any) -> None:
        if progress["step"] == 3:
            interruption.request("released")

    with pytest.raises(TrainingInterrupted):
        train(config("resumed"), scorer=lucky_scorer, interruption=interruption, report=stop)
    log.unlink()  # a resumed run has its own
    resumed = train(config("resumed"), scorer=lucky_scorer, resume=True)
    weights = [(Path(result.path) / "model.safetensors").read_bytes() for result in (straight, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kind", ["quark", "rloo"])
def test_ratings_are_rewards_and_what_nobody_rated_is_left_out(make_config: Any, tmp_path: Path, kind: str) -> None:
    rated = candidates("rated", "t10", ["t7 t8", "t9", "t7", "t6"])
    for rollout, ratings in zip(rated, [(1.0, 0.0), (-1.0,), (), (None,)], strict=True):
        rollout["feedback"] = said(*ratings)
    other = candidates("other", "t11", ["t7", "t9"], feedback=said(0.25))
    log = write_log(tmp_path / "log.jsonl", rated, other)
    config = make_config(
        objective={"kind": kind},
        reward={"name": "people", "source": "feedback"},
        logged={"enabled": True, "path": [str(log)]},
        prompts={"type": "log"},
        fresh={"source": "local", "interval": 0, "num_per_prompt": 2},
        evaluation={"share": 0.0},
        steps=2,
        checkpoint={"every": 1, "keep": 9},
    )
    result = train(config)
    assert log_figures(config) == {"num_read": 6.0, "num_used": 4.0, "left_out/unrated": 2.0}
    rewards = objective_arrays(config, 1)["rewards"].tolist()
    assert sorted(rewards) == [-1.0, 0.25, 0.25, 0.5]
    assert read_manifest(Path(result.path)).reward == "people@ratings"


def test_ratings_of_the_same_output_in_two_answers_are_one_mean_in_a_pool(make_config: Any, tmp_path: Path) -> None:
    groups = [candidates(f"q{i}", "t10", ["t7"], feedback=said(rating)) for i, rating in enumerate([1.0, 0.0, -0.5])]
    log = write_log(tmp_path / "log.jsonl", *groups)
    config = make_config(
        reward={"name": "people", "source": "feedback"},
        logged={"enabled": True, "path": str(log)},
        prompts={"type": "log"},
        fresh={"source": "local", "interval": 0},
        evaluation={"share": 0.0},
        steps=1,
    )
    train(config)
    assert objective_arrays(config, 1)["rewards"].tolist() == [0.5 / 3]


def test_a_log_without_ratings_leaves_nothing_to_learn_from(make_config: Any, tmp_path: Path) -> None:
    config = make_config(
        reward={"name": "people", "source": "feedback"},
        logged={"enabled": True, "path": str(write_log(tmp_path / "log.jsonl", *FAIR))},
        prompts={"type": "log"},
        fresh={"source": "local", "interval": 0},
        evaluation={"share": 0.0},
    )
    with pytest.raises(InvalidRequestError, match="nothing to learn from"):
        train(config)


def test_no_form_of_a_held_out_prompt_is_learned_from(make_config: Any, lucky_scorer: Any, tmp_path: Path) -> None:
    """The run has the prompts t10 to t39; the log has them in other letters, and t50 to t63, which it does not have."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"t{i}"}) + "\n" for i in range(10, 40)))
    ids = [*range(10, 40), *range(50, 64)]
    groups = [candidates(f"q{i}", f"t{i}", ["t7"]) for i in ids]
    for (rollout,), i in zip(groups, ids, strict=True):
        rollout["prompt"] = f" T{i} "
    config = make_config(
        prompts={"type": "file", "path": str(prompts)},
        logged={"enabled": True, "path": str(write_log(tmp_path / "log.jsonl", *groups))},
        fresh={"source": "local", "interval": 0},
        evaluation={"share": 0.4, "num_per_prompt": 1},
        steps=1,
    )
    train(config, scorer=lucky_scorer)
    expected = {i for i in ids if not is_held_out(f"t{i}", 0.4, seed=config.seed)}
    assert 10 < len(expected) < len(ids) - 10
    assert {i for i in ids[30:] if i not in expected}  # some that the run does not even have
    assert set(objective_arrays(config, 1)["prompt_ids"].tolist()) == expected
    assert log_figures(config)["left_out/held_out"] == len(ids) - len(expected)


def test_logged_rollouts_whose_rank_is_not_known_are_left_out(
    make_config: Any, lucky_scorer: Any, tmp_path: Path
) -> None:
    """The run has no reference rollouts for t11, which only the log knows."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "t10"}\n')
    config = make_config(
        prompts={"type": "file", "path": str(prompts)},
        reward={"name": "lucky", "source": "local", "transform": {"kind": "calibrated", "num_reference": 2}},
        logged={"enabled": True, "path": str(write_log(tmp_path / "log.jsonl", *FAIR))},
        fresh={"source": "local", "interval": 0},
        evaluation={"share": 0.0},
        steps=1,
    )
    train(config, scorer=lucky_scorer)
    assert log_figures(config) == {"num_read": 6.0, "num_used": 3.0, "left_out/no_reference": 3.0}
    assert set(objective_arrays(config, 1)["prompt_ids"].tolist()) == {10}
