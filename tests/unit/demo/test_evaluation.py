import io
import math

import pytest
from rich.console import Console

from trimtab_training.demo import world
from trimtab_training.demo.evaluation import (
    PROXY_NOTE,
    SYSTEMS,
    System,
    figures_of,
    figures_table,
    footnotes,
    measure,
    samples_table,
)
from trimtab_training.demo.gateway import Answer, Gateway

PROMPTS = ["Ada: Do you have a red hat?\nIda:", "Ivan: Do you have a [bold]red[/bold] kite?\nTom:"]


def _text(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_figures_follow_from_the_answers() -> None:
    answers = [
        Answer(" I see. I see.", [math.log(0.5)], [0.2], num_tokens=10, num_reference_tokens=4),
        Answer(" Maybe.", [math.log(0.5)] * 3, [0.4, 0.0, 0.2], num_tokens=20),
    ]
    figures = figures_of(SYSTEMS[1], PROMPTS, answers)
    rewards = [world.kindness_reward(PROMPTS[0], "I see. I see."), world.kindness_reward(PROMPTS[1], "Maybe.")]
    assert figures.reward.mean == pytest.approx(sum(rewards) / 2)
    assert figures.kl == pytest.approx(0.2)  # (0.2 + 0.4 + 0 + 0.2) / 4 tokens
    assert figures.perplexity == pytest.approx(2.0)
    assert figures.distinct_2 == pytest.approx(2 / 3)  # i see, see i, i see
    assert (figures.tokens, figures.reference_tokens) == (15, 2)
    assert figures.texts == ("I see. I see.", "Maybe.")


def test_the_four_systems_ask_for_base_and_route_alone_and_best_of_8_by_the_reward() -> None:
    bodies = [system.body("p") for system in SYSTEMS]
    assert [(body["model"], body.get("best_of")) for body in bodies] == [
        ("base", None),
        ("kind", None),
        ("base", 8),
        ("kind", 8),
    ]
    assert all(body["steering_logprobs"] and body["stop"] == ["\n"] for body in bodies)
    assert [body.get("reward") for body in bodies] == [None, None, "demo-kindness", "demo-kindness"]


def test_a_system_is_measured_through_the_gateway(gateway: Gateway) -> None:
    base = measure(gateway, System("base", "base"), PROMPTS)
    steered = measure(gateway, System("steered, best of 8", "kind", 8), PROMPTS)
    assert steered.reward.mean > base.reward.mean
    assert (base.kl, steered.kl) == (0.0, 0.25)
    assert (base.tokens, steered.tokens) == (2.0, 16.0)


def test_table_and_samples_show_all_systems_and_take_brackets_literally(gateway: Gateway) -> None:
    rows = [measure(gateway, system, PROMPTS) for system in SYSTEMS]
    table, samples = _text(figures_table(rows)), _text(samples_table(PROMPTS, rows))
    for system in SYSTEMS:
        assert system.name in table
    assert "2 held-out prompts" in table
    assert "[bold]red[/bold]" in samples
    assert samples.count("Go away.") == 2


def test_brackets_in_an_answer_are_shown_as_they_are() -> None:
    row = figures_of(SYSTEMS[0], PROMPTS[:1], [Answer(" Take [red]this[/red].", [], [], num_tokens=3)])
    assert "[red]this[/red]" in _text(samples_table(PROMPTS[:1], [row]))


def test_the_footnotes_give_the_bound_of_the_selection_and_say_what_the_reward_is(gateway: Gateway) -> None:
    notes = footnotes([measure(gateway, SYSTEMS[0], PROMPTS)])
    assert "1.20 nats" in notes[0]
    assert notes[-1] == PROXY_NOTE


def test_figures_as_json_are_plain_values(gateway: Gateway) -> None:
    row = measure(gateway, SYSTEMS[3], PROMPTS).to_json()
    assert row["system"] == "steered, best of 8"
    assert row["num_prompts"] == 2
    assert row["selection_kl_bound_per_answer"] == pytest.approx(1.2044415)
    assert all(isinstance(value, str | int | float) for value in row.values())
