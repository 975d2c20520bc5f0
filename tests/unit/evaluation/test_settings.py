from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_training.config import read_tree
from trimtab_training.evaluation.options import build_parser, parse_policy, tree_of
from trimtab_training.evaluation.procedures import STANDARD, Chosen, Served, parse_procedure
from trimtab_training.evaluation.settings import EvaluateConfig, parse_config

TOML = """
prompts = "prompts.jsonl"
reward = "helpful"
judge = "careful"
procedures = ["standard", "best_of_n:8", 'served:{"best_of": 8}']
pairs = [["brand@best_of_n:4", "base"]]
samples = 16

[gateway]
url = "http://127.0.0.1:8000"
concurrency = 4

[[policies]]
name = "base"

[[policies]]
name = "half"
model = "brand"
steering = { adapters = [{ name = "brand", alpha = 0.5 }] }

[[policies]]
name = "brand"

[sampling]
max_tokens = 32

[interval]
method = "percentile"

[output]
plot_file = "report.svg"
"""


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "gateway": {"url": "http://gateway"},
        "prompts": "p.jsonl",
        "reward": "r",
        "policies": [{"name": "base"}, {"name": "brand"}],
        "samples": 8,
        **changes,
    }


def test_a_file_says_it_all(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.toml"
    path.write_text(TOML)
    config = parse_config(read_tree(path))
    assert config.reference_name == "base"
    assert config.parsed_procedures == (STANDARD, Chosen("best", 8), Served('{"best_of":8}'))
    ((first, second),) = config.pairs
    assert (first.policy, first.parsed) == ("brand", Chosen("best", 4))
    assert (second.policy, second.parsed) == ("base", STANDARD)
    assert config.output.plot_file == Path("report.svg")


def test_flags_say_the_same_and_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.toml"
    path.write_text(TOML)
    flags = [
        *("--gateway", "http://127.0.0.1:8000", "--concurrency", "4", "--prompts", "prompts.jsonl"),
        *(
            "--reward",
            "helpful",
            "--judge",
            "careful",
            "--samples",
            "16",
            "--max-tokens",
            "32",
            "--interval",
            "percentile",
        ),
        *("--policy", "base", "--policy", 'half={"adapters": [{"name": "brand", "alpha": 0.5}]}', "--policy", "brand"),
        *("--procedure", "standard", "--procedure", "best_of_n:8", "--procedure", 'served:{"best_of": 8}'),
        *("--pair", "brand@best_of_n:4", "base", "--plot", "report.svg"),
    ]
    by_flags = parse_config(tree_of(build_parser().parse_args(flags)))
    by_file = parse_config(read_tree(path))
    half = by_file.policies[1].model_copy(update={"model": None})  # the flag's steering is the base model's
    same = by_file.model_copy(update={"policies": (by_file.policies[0], half, by_file.policies[2])})
    assert by_flags == same
    arguments = build_parser().parse_args(["--config", str(path), "--samples", "9", "--set", "seed=5"])
    assert (parse_config(tree_of(arguments)).samples, parse_config(tree_of(arguments)).seed) == (9, 5)
    with pytest.raises(InvalidRequestError, match="no --config"):
        tree_of(build_parser().parse_args(["--set", "seed=5"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampels": 4}, "sampels"),
        ({"policies": []}, "policies"),
        ({"policies": [{"name": "base"}, {"name": "base"}]}, "same name"),
        ({"policies": [{"name": "a@b"}]}, "policies.0.name"),
        ({"policies": [{"name": "x", "steering": {"adapter": []}}]}, "not a steering: adapter"),
        ({"policies": [{"name": "x", "steering": {"explain": True}}]}, "no use for 'explain'"),
        ({"reference": "other"}, "there is no policy other; there are base, brand"),
        ({"pairs": [["other@standard", "base"]]}, "there is no policy other"),
        ({"pairs": [["base@best", "base"]]}, "'best' is no procedure"),
        ({"judge": "r"}, "the judge is the reward itself"),
        ({"procedures": ["best_of_n:9"]}, "best_of_n:9 needs 9 samples per prompt; samples is 8"),
        ({"procedures": ["best_of_n:0"]}, "from 1 to 1024"),
        ({"pairs": [["base@best_of_n:8", "base"]]}, "needs 9 samples per prompt, of which no two of an index"),
        ({"pairs": [["base@best_of_n:5", "base@best_of_n:5"]]}, "needs 10 samples per prompt, of which"),
        ({"procedures": ["best_of_n:5"], "common_seeds": True}, "needs 10 samples per prompt, of which"),
        ({"output": {"plot_file": "report.txt"}}, "must end in .png, .svg or .pdf"),
        ({"samples": 1}, "samples"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message.replace("(", r"\(")):
        parse_config(tree(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"procedures": ["best_of_n:8"]},
        {"pairs": [["base@best_of_n:7", "base"]]},
        {"pairs": [["base@best_of_n:8", 'base@served:{"best_of":8}']]},
        {"procedures": ["best_of_n:4"], "common_seeds": True},
        {"policies": [{"name": "base"}], "procedures": ["best_of_n:8"]},
    ],
)
def test_as_many_samples_as_are_needed_are_enough(changes: dict[str, Any]) -> None:
    assert isinstance(parse_config(tree(**changes)), EvaluateConfig)


def test_procedures_read_and_write_the_same() -> None:
    for text in ("standard", "best_of_n:8", "worst_of_n:3", 'served:{"best_of":4,"strategy":"soft"}', "served:{}"):
        assert parse_procedure(text).label == text
    assert parse_procedure("best_of_n:1") is STANDARD
    for text in ("best_of_n", "best_of_n:-1", "served:[1]", "served:{", "served"):
        with pytest.raises(InvalidRequestError):
            parse_procedure(text)


def test_a_served_procedure_is_the_fields_of_a_request() -> None:
    served = parse_procedure('served:{"strategy": "adaptive", "threshold": 0.9, "best_of": 16}')
    assert isinstance(served, Served)
    assert served.body("r") == {
        "best_of": 16,
        "selection": {"strategy": "adaptive", "threshold": 0.9},
        "reward": "r",
    }
    assert Served("{}").body("r") == {}


def test_a_policy_is_a_name_or_a_steering() -> None:
    assert parse_policy("brand") == {"name": "brand"}
    assert parse_policy('x={"adapters": []}') == {"name": "x", "steering": {"adapters": []}}
    for text in ("x={", "x=3"):
        with pytest.raises(InvalidRequestError, match="JSON"):
            parse_policy(text)
