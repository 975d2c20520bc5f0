import json
from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.records import Rollout
from trimtab_training.config import SamplingConfig
from trimtab_training.sampling_settings import is_drawn_like, model_defaults, off_policy_reason


def rollout(sampling: dict[str, Any] | None = None, **fields: Any) -> Rollout:
    return Rollout.model_validate(
        {
            "id": "r",
            "request_id": "q",
            "created_at": 0.0,
            "duration_s": 0.0,
            "route": "r",
            "base_model": "b",
            "endpoint": "completions",
            "prompt": "t1",
            "prompt_token_ids": [1],
            "output_text": "t7 t8",
            "output_token_ids": [7, 8],
            "steering": [],
            "steered_logprobs": [-0.5, -0.25],
            "base_logprobs": [-1.0, -2.0],
            "sampling": {"temperature": 1.0, **(sampling or {})},
            "finish_reason": "stop",
            **fields,
        }
    )


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1},
        {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"top_k": 0, "repetition_penalty": 1.0, "logit_bias": {}, "bad_words": [], "min_tokens": 0},
        # where it ends, which of the draws it was, and how it was shown
        {"max_tokens": 4, "stop": ["."], "stop_token_ids": [5], "ignore_eos": True, "seed": 3, "echo": True},
        {"skip_special_tokens": False, "add_special_tokens": False, "priority": 3},
    ],
)
def test_samples_of_the_policy_itself_keep_their_logprobs(sampling: dict[str, Any]) -> None:
    assert off_policy_reason(rollout(sampling), {}) is None


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": 0.7}, "sampling_temperature"),
        ({"temperature": 0}, "sampling_temperature"),
        ({"top_p": 0.9}, "sampling_top_p"),
        ({"top_k": 40}, "sampling_top_k"),
        ({"min_p": 0.1}, "sampling_min_p"),
        ({"presence_penalty": 0.5}, "sampling_presence_penalty"),
        ({"frequency_penalty": -0.5}, "sampling_frequency_penalty"),
        ({"repetition_penalty": 1.1}, "sampling_repetition_penalty"),
        ({"logit_bias": {"7": 5.0}}, "sampling_logit_bias"),
        ({"min_tokens": 2}, "sampling_min_tokens"),
        ({"allowed_token_ids": [7, 8]}, "sampling_allowed_token_ids"),
        ({"bad_words": ["t9"]}, "sampling_bad_words"),
        ({"structured_outputs": {"regex": "x"}}, "sampling_structured_outputs"),
        ({"a_setting_of_next_year": 1}, "sampling_a_setting_of_next_year"),
        ({"steering_operators": {"max_kl": 0.5}}, "operators"),
        ({"guidance": {"token_ids": [1], "scale": 1.5}}, "operators"),
        ({"selection": {"strategy": "blockwise"}}, "operators"),
    ],
)
def test_anything_that_bends_the_distribution_takes_the_logprobs_away(sampling: dict[str, Any], reason: str) -> None:
    assert off_policy_reason(rollout(sampling), {}) == reason


@pytest.mark.parametrize("strategy", ["adaptive", "early_reject", "rejection", "one_of_next_year"])
def test_strategies_that_look_before_all_are_drawn_leave_no_fair_samples(strategy: str) -> None:
    assert off_policy_reason(rollout(metadata={"selection": strategy}), {}) == "strategy"


@pytest.mark.parametrize("strategy", ["soft", "poisson"])
def test_strategies_that_draw_all_candidates_first_leave_fair_samples(strategy: str) -> None:
    assert off_policy_reason(rollout(metadata={"selection": strategy}), {}) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"steered_logprobs": None},
        {"base_logprobs": None},
        {"steered_logprobs": [-0.5]},
        {"steered_logprobs": [-0.5, float("nan")]},
        {"base_logprobs": [-0.5, float("-inf")]},
        {"steered_logprobs": [-0.5, -9999.0]},  # the mark of steering that failed
    ],
)
def test_logprobs_that_are_not_all_there_are_none(fields: dict[str, Any]) -> None:
    assert off_policy_reason(rollout(**fields), {}) == "no_logprobs"


def test_the_base_models_own_defaults_hold_where_a_request_did_not_say(tmp_path: Path) -> None:
    assert model_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"top_k": 20, "temperature": None, "eos_token_id": 3, "do_sample": True}))
    defaults = model_defaults(tmp_path)
    assert defaults == {"top_k": 20}
    assert off_policy_reason(rollout(), defaults) == "sampling_top_k"
    assert off_policy_reason(rollout({"top_k": None}), defaults) == "sampling_top_k"
    assert off_policy_reason(rollout({"top_k": -1}), defaults) is None
    path.write_text(json.dumps({"temperature": 0.6}))
    silent = rollout().model_copy(update={"sampling": {}})
    assert off_policy_reason(silent, model_defaults(tmp_path)) == "sampling_temperature"
    assert off_policy_reason(silent, {}) is None  # vLLM's own default is 1
    path.write_text("{")
    with pytest.raises(InvalidRequestError, match="generation_config"):
        model_defaults(tmp_path)


def test_references_were_drawn_as_the_run_draws() -> None:
    config = SamplingConfig(max_tokens=4, temperature=0.7, top_p=0.9, stop=(".",), stop_token_ids=(5,))
    same = {"max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "stop": ["."], "stop_token_ids": [5]}
    assert is_drawn_like(rollout({**same, "seed": 3, "top_k": -1, "min_p": 0.0}), config, {})
    others: list[dict[str, Any]] = [
        {"max_tokens": 5},
        {"temperature": 1.0},
        {"top_p": 1.0},
        {"stop": []},
        {"stop_token_ids": [5, 6]},
        {"top_k": 5},
        {"ignore_eos": True},
        {"add_special_tokens": True},
        {"add_special_tokens": False},
        {"presence_penalty": 1.0},
    ]
    for other in others:
        assert not is_drawn_like(rollout({**same, **other}), config, {}), other
    assert not is_drawn_like(rollout(same), config, {"top_k": 20})
    assert is_drawn_like(rollout({"max_tokens": 64, "ignore_eos": False, "stop": None}), SamplingConfig(), {})
