import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_training.config import GatewayConfig, PromptFile, TrainConfig, load_config, parse_config
from trimtab_training.logged_config import LoggedConfig
from trimtab_training.objective_config import (
    BonbonConfig,
    NlpoConfig,
    PpoConfig,
    QuarkConfig,
    RlooConfig,
    VbonConfig,
)

MINIMAL: dict[str, Any] = {
    "output_dir": "out",
    "models": {"base_model": "base", "adapter": "adapter"},
    "reward": {"name": "r"},
    "prompts": {"type": "log"},
    "publish": {"name": "a"},
    "gateway": {"url": "http://127.0.0.1:1"},
    "fresh": {"model": "base"},
}

TOML = """
output_dir = "out"
[models]
base_model = "base"
adapter = "adapter"
[reward]
name = "r"
[prompts]
type = "log"
[publish]
name = "a"
[gateway]
url = "http://127.0.0.1:1"
[fresh]
model = "base"
"""


def changed(**sections: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(MINIMAL))
    for key, value in sections.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return data


def test_defaults_are_quarks() -> None:
    config = parse_config(MINIMAL)
    assert config.objective == QuarkConfig(num_bins=5, kl_coef=0.05, entropy_coef=0.06)
    assert config.models.alpha == 1.0
    assert config.logged == LoggedConfig()


def test_toml_and_json_give_the_same_tree(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    (tmp_path / "c.json").write_text(json.dumps(MINIMAL))
    assert load_config(tmp_path / "c.toml") == load_config(tmp_path / "c.json") == parse_config(MINIMAL)


def test_a_dumped_configuration_reads_back_as_itself() -> None:
    config = parse_config(changed(sampling={"stop": ["."], "stop_token_ids": [3]}))
    assert parse_config(config.model_dump(mode="json")) == config
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_overrides_are_json_or_else_text(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    config = load_config(
        tmp_path / "c.toml", ["steps=7", "optimiser.lr=1e-3", "reward.name=kind ness", 'sampling.stop=["x"]']
    )
    assert (config.steps, config.optimiser.lr, config.reward.name) == (7, 1e-3, "kind ness")
    assert config.sampling.stop == ("x",)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": {"num_bin": 3}}, "objective.quark.num_bin"),
        ({"setps": 3}, "setps"),
        ({"models": {"alpha": 0.0}}, "models"),
        ({"models": {"alpha": float("nan")}}, "models.alpha"),
        ({"models": {"alpha": 101}}, "models.alpha"),
        ({"models": {"start_scale": 0}}, "models.start_scale"),
        ({"models": {"start_scale": 0.1, "lora": {}}}, "start_scale"),
        ({"steps": 0}, "steps"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"prompts": {"type": "database"}}, "prompts"),
        ({"publish": {"name": "with space"}}, "publish.name"),
        ({"fresh": {"model": None}}, "fresh.model"),
        ({"fresh": {"source": "local"}, "sampling": {"stop": ["."]}}, "sampling.stop"),
        ({"logged": {"enabled": False}}, "prompts.type"),
        ({"prompts": {"type": "file", "path": "p"}, "logged": {"enabled": False}, "fresh": {"interval": 0}}, "learn"),
        ({"publish": {"route": "r"}, "evaluation": {"share": 0}}, "require_gate"),
        ({"gate": {"max_kl": 1}}, "gate.max_kl"),
        ({"gate": {"max_perplexity_ratio": 0}}, "gate.max_perplexity_ratio"),
        ({"gate": {"refused_signatures": ["odd"]}}, "gate.refused_signatures"),
        ({"gate": {"min_second_reward_difference": 0}}, "second_reward"),
        ({"evaluation": {"second_reward": {"name": "r"}}}, "second_reward"),
        ({"evaluation": {"procedure": "best_of_n"}}, "evaluation.procedure"),
        ({"evaluation": {"procedure": "served:{}"}}, "evaluation.procedure"),
        ({"evaluation": {"refusal_phrases": [" "]}}, "evaluation.refusal_phrases"),
        ({"report": {"num_samples": 0}}, "report.num_samples"),
        ({"gateway": None}, "[gateway]"),
        ({"logged": {"path": "log.csv"}}, "logged.path"),
        ({"logged": {"min_reward": 0.5}}, "`reward`"),
        ({"logged": {"min_rating": 2}}, "logged.min_rating"),
        ({"objective": {"kind": "rloo"}, "fresh": {"num_per_prompt": 2}, "logged": {"min_rating": 0}}, "min_rating"),
        ({"objective": {"kind": "rloo"}, "fresh": {"num_per_prompt": 2}, "logged": {"reward": "r"}}, "chosen by what"),
        ({"objective": {"kind": "ppo"}, "sampling": {"temperature": 0.5}}, "temperature = 1"),
        ({"objective": {"kind": "ppo", "kl_coef": 0.0, "kl_target": 0.1}}, "kl_target"),
        ({"objective": {"kind": "nlpo"}}, "an engine cannot"),
        ({"objective": {"kind": "nlpo"}, "fresh": {"source": "local"}}, "under its mask: set logged.enabled = false"),
        ({"objective": {"kind": "bonbon"}}, "fresh.num_per_prompt to 8"),
        (
            {"objective": {"kind": "bonbon", "n": 4}, "fresh": {"num_per_prompt": 4}},
            "from the base: set logged.enabled",
        ),
    ],
)
def test_a_bad_value_is_refused_and_named(change: dict[str, Any], named: str) -> None:
    data = changed(**change)
    if change.get("prompts", {}).get("type") == "database":
        data["prompts"] = change["prompts"]
    with pytest.raises(InvalidRequestError) as error:
        parse_config(data)
    assert named in error.value.message


RATED: dict[str, Any] = {
    "reward": {"source": "feedback"},
    "fresh": {"interval": 0, "num_per_prompt": 2},
    "evaluation": {"share": 0},
}


@pytest.mark.parametrize("kind", ["quark", "rloo", "ppo"])
def test_ratings_suffice_for_objectives_that_learn_from_a_log(kind: str) -> None:
    assert parse_config(changed(**RATED, objective={"kind": kind})).reward.source == "feedback"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fresh": {"interval": 5}}, "nobody rates fresh rollouts"),
        ({"evaluation": {"share": 0.1}}, "nobody rates its outputs"),
        ({"reward": {"source": "feedback", "transform": {"kind": "calibrated"}}}, "reference rollouts"),
        ({"objective": {"kind": "bonbon"}}, "quark, rloo or ppo"),
        ({"objective": {"kind": "nlpo"}}, "quark, rloo or ppo"),
        ({"objective": {"kind": "vbon"}}, "quark, rloo or ppo"),
    ],
)
def test_ratings_do_not_suffice_for_what_nobody_rated(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        parse_config(changed(**{**RATED, **change}))


def test_rollouts_from_files_need_no_gateway() -> None:
    local = {"gateway": None, "fresh": {"source": "local"}, "reward": {"source": "local"}}
    with pytest.raises(InvalidRequestError, match=r"without logged\.path"):
        parse_config(changed(**local))
    config = parse_config(changed(**local, logged={"path": "log.parquet"}))
    assert config.logged.path == (Path("log.parquet"),)
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=3", "steps.x=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.toml").write_text("steps = 3\n" + TOML)
    with pytest.raises(InvalidRequestError, match="--set"):
        load_config(tmp_path / "c.toml", [override])


def test_a_missing_or_malformed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(InvalidRequestError, match="malformed"):
        load_config(tmp_path / "bad.toml")


def test_every_field_has_a_sentence() -> None:
    objectives: list[type[BaseModel]] = [QuarkConfig, RlooConfig, VbonConfig, PpoConfig, NlpoConfig, BonbonConfig]
    waiting: list[type[BaseModel]] = [TrainConfig, GatewayConfig, PromptFile, *objectives]
    while waiting:
        section = waiting.pop()
        for name, field in section.model_fields.items():
            assert name in ("type", "kind") or (field.description or "").endswith("."), f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                waiting.append(field.annotation)


def test_the_older_name_of_the_gates_switch_is_read() -> None:
    assert not parse_config(changed(publish={"require_improvement": False})).publish.require_gate
    assert not parse_config(changed(publish={"require_gate": False})).publish.require_gate
    assert parse_config(MINIMAL).publish.require_gate


def test_a_threshold_is_dropped_by_the_word_off() -> None:
    assert parse_config(MINIMAL).gate.max_perplexity_ratio == 1.5
    for value in ("off", None):
        config = parse_config(changed(gate={"max_perplexity_ratio": value}))
        assert config.gate.max_perplexity_ratio is None
        assert parse_config(config.model_dump(mode="json")) == config
