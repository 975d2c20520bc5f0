"""Systems against each other, from outcomes to rows, and one task from data to table on tiny random models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks import run
from tasks.comparison import BASE, TUNED, as_rows, compare, table
from tasks.figures import Floats
from tasks.outcomes import Outcomes
from tasks.task import LONG_ENOUGH


def outcomes(judge: Floats, *, nll_per_token: float = 2.0) -> Outcomes:
    tokens = np.full(judge.shape, 4.0)
    ids = [[(i, j, i, j) for j in range(judge.shape[1])] for i in range(judge.shape[0])]
    return Outcomes({"reward": judge, "judge": judge}, nll_per_token * tokens, np.zeros(judge.shape), tokens, ids)


def test_gains_are_paired_and_stated_as_a_share_of_fine_tuning() -> None:
    judge = np.linspace(0.0, 0.5, 20).reshape(10, 2)
    systems = {
        BASE: outcomes(judge),
        "IPA": outcomes(judge + 0.1, nll_per_token=2.1),
        TUNED: outcomes(judge + 0.2),
    }
    rows = compare(systems, seed=0)
    # The same gain on every prompt, so the intervals are points.
    assert (gain := rows["IPA"]["judge - base"]) is not None
    assert gain.as_list() == pytest.approx([0.1, 0.1, 0.1])
    assert (share := rows["IPA"]["share of tuned gain"]) is not None
    assert share.as_list() == pytest.approx([0.5, 0.5, 0.5])
    assert (relative := rows["IPA"]["perplexity / base"]) is not None
    assert relative.value == pytest.approx(np.exp(0.1))
    # 10 outputs in each column with pairs (i, j), (j, i), (i, j): column 0 has (i,0) and (0,i) for i = 0..9, in all 19
    # different of 30 pairs, and so has column 1.
    assert (pairs := rows[BASE]["distinct-2"]) is not None
    assert pairs.value == pytest.approx(19 / 30)
    assert rows[BASE]["judge - base"] is None
    assert {row["system"] for row in as_rows(rows)} == {BASE, "IPA", TUNED}
    assert "0.100 [0.100, 0.100]" in table(rows)


def test_no_share_is_stated_where_fine_tuning_gains_nothing_for_sure() -> None:
    rng = np.random.default_rng(0)
    judge, noise = rng.random((10, 2)), rng.normal(size=(10, 2))
    rows = compare({BASE: outcomes(judge), "IPA": outcomes(judge + 0.1), TUNED: outcomes(judge + noise)}, seed=0)
    assert rows["IPA"]["share of tuned gain"] is None


def test_what_is_too_short_does_not_blur_what_the_judge_says_of_the_rest() -> None:
    # Two prompts of two outputs. The base has one output too short, worth 0.2; the other system only makes it long.
    long = np.array([[1.0, 0.0], [1.0, 1.0]])
    judge = np.where(long > 0, 0.6, 0.2)
    base = replace(outcomes(judge), scores={"judge": judge, LONG_ENOUGH: long})
    every = np.ones((2, 2))
    longer = replace(outcomes(0.6 * every), scores={"judge": 0.6 * every, LONG_ENOUGH: every})
    rows = compare({BASE: base, "IPA": longer}, seed=0)
    assert (gain := rows["IPA"]["judge - base"]) is not None
    assert gain.value == pytest.approx((0.6 - 0.2) / 4)
    assert (judged := rows["IPA"]["judge of long ones"]) is not None
    assert judged.value == pytest.approx(0.6)
    assert (difference := rows["IPA"]["its difference"]) is not None
    assert difference.as_list() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


def test_a_choice_takes_all_figures_of_the_chosen_and_claims_no_kl() -> None:
    found = outcomes(np.array([[0.1, 0.9], [0.8, 0.2]])).chosen(np.array([[1], [0]]))
    assert found.scores["judge"].tolist() == [[0.9], [0.8]]
    assert found.token_ids == [[(0, 1, 0, 1)], [(1, 0, 1, 0)]]
    assert found.kl is None
    assert compare({BASE: found}, seed=0)[BASE]["kl"] is None


def test_seeds_are_pooled_as_further_outputs_of_the_same_prompts() -> None:
    one, other = outcomes(np.array([[0.1], [0.2]])), outcomes(np.array([[0.3], [0.4]]))
    joined = Outcomes.joined([one, other])
    assert joined.scores["judge"].tolist() == [[0.1, 0.3], [0.2, 0.4]]
    assert [len(row) for row in joined.token_ids] == [2, 2]


def test_a_task_runs_from_data_to_table(small_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "toxicity", "--quick", "--data", str(small_world / "data"), "--threads", "1"]
    arguments += ["--base", str(small_world / "base"), "--start", str(small_world / "start"), "--seeds", "0,1"]
    small = {"steps": 2, "num_prompts": 8, "num_samples": 3, "prompts_per_round": 8, "num_per_prompt": 2}
    for name, value in {**small, "batch_size": 8, "expert": {"epochs": 1}}.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    path = small_world / "result.json"
    assert run.main([*arguments, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    systems = {row["system"] for row in result["rows"]}
    assert systems == {"base", "IPA", "fine-tuned base", "experts", "base, best of 3", "IPA, best of 3"}
    # Two steps of 8 rollouts each, from two rounds of 8 x 2 at most: the same for both that are trained.
    for seed in result["seeds"]:
        assert seed["costs"]["ipa"]["rollouts"] == seed["costs"]["fine_tuning"]["rollouts"] == 16
        assert seed["costs"]["ipa"]["steps"] == seed["costs"]["fine_tuning"]["steps"] == 2
    reward = {row["system"]: row["value"] for row in result["rows"] if row["figure"] == "reward"}
    assert reward["base, best of 3"] > reward["base"]
    printed = capsys.readouterr()
    assert "| IPA |" in printed.out
    assert "cruel" not in printed.out + printed.err  # no text, only figures
    # Made once: the second time everything trained is there.
    began = {path: path.stat().st_mtime_ns for path in (small_world / "cache").rglob("recipe.json")}
    run.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (small_world / "cache").rglob("recipe.json")} == began
