"""`docs/rewards.md` is complete, and its commands are right."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from trimtab_adapters.contract.rewards import RewardKind, RewardSpec
from trimtab_server.commands.rewards import parse_option
from trimtab_server.rewards.classifier import ClassifierOptions
from trimtab_server.rewards.composite import CompositeOptions, parse_mix
from trimtab_server.rewards.http import HttpOptions
from trimtab_server.rewards.json_schema import JsonSchemaOptions
from trimtab_server.rewards.keywords import KeywordOptions
from trimtab_server.rewards.limits import LIMIT_NAMES, RewardLimits, parse_limits, parse_options
from trimtab_server.rewards.llm_judge import JudgeOptions
from trimtab_server.rewards.regex_match import RegexOptions
from trimtab_server.rewards.sentiment import SentimentOptions

TEXT = (Path(__file__).parents[4] / "docs" / "rewards.md").read_text()
OPTIONS: dict[str, type[BaseModel]] = {
    "hf_classifier": ClassifierOptions,
    "http": HttpOptions,
    "json_schema": JsonSchemaOptions,
    "keywords": KeywordOptions,
    "llm_judge": JudgeOptions,
    "regex": RegexOptions,
    "sentiment": SentimentOptions,
    "composite": CompositeOptions,
}
COMMANDS = re.findall(r"^    (trimtab rewards add (?!NAME).*)$", TEXT, re.MULTILINE)


def section(heading: str) -> str:
    """From a heading to the next of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,3}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[2]


def rows(text: str) -> str:
    """The first cells of tables."""
    return "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_stands_in_the_table_of_its_kind(kind: str) -> None:
    names = {field.alias or name for name, field in OPTIONS[kind].model_fields.items()} - LIMIT_NAMES
    assert set(re.findall(r"`(\w+)`", rows(section(kind)))) == names


def test_every_limit_stands_in_its_table() -> None:
    assert set(re.findall(r"`(\w+)`", rows(section("Options that every kind has")))) == LIMIT_NAMES


def test_every_kind_has_a_command() -> None:
    assert {shlex.split(command)[5] for command in COMMANDS} == set(get_args(RewardKind))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_options_that_its_kind_takes(command: str) -> None:
    words = shlex.split(command.replace("$(cat schema.json)", "{}").replace('"schema={}"', "schema={}"))
    _, _, _, name, _, kind, *rest = words
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    targets = [value for flag, value in pairs if flag == "--target"]
    options = dict(parse_option(value) for flag, value in pairs if flag == "--option")
    spec = RewardSpec.model_validate({"name": name, "kind": kind, "target": "".join(targets), "options": options})
    if kind == "composite":
        parse_mix(spec)
    elif kind == "callable":
        parse_limits(RewardLimits, spec)
    else:
        model = OPTIONS[kind]
        assert issubclass(model, RewardLimits)
        parse_options(model, spec, has_target=bool(targets))
