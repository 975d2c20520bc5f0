"""The whole program against a gateway over the fake engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation_bench import Bench, busy
from fake_gateway import KIND
from trimtab_adapters.contract.best_of_n import best_of_n_kl_upper_bound
from trimtab_adapters.contract.errors import ConflictError, NotFoundError, RewardError, TrimtabError
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_training import cli
from trimtab_training.evaluation.report import Report
from trimtab_training.evaluation.run import evaluate
from trimtab_training.evaluation.sample_cache import MemorySamples, SampleCache, SampleFile
from trimtab_training.evaluation.settings import EvaluateConfig, parse_config
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption, TrainingInterrupted


def config_of(bench: Bench, prompts: Path, **changes: Any) -> EvaluateConfig:
    return parse_config(
        {
            "gateway": {"url": bench.url, "concurrency": 4, "retry_for_s": 5.0},
            "prompts": str(prompts),
            "reward": "noise",
            "policies": [{"name": "base"}, {"name": "kind"}],
            "samples": 3,
            "sampling": {"max_tokens": 6},
            "interval": {"num_resamples": 100},
            **changes,
        }
    )


def run(config: EvaluateConfig, cache: SampleCache | None = None, interruption: Interruption | None = None) -> Report:
    interruption = interruption or Interruption()
    settings = config.gateway
    with GatewayClient(
        settings.url,
        concurrency=settings.concurrency,
        retry_for_s=settings.retry_for_s,
        interruption=interruption,
    ) as gateway:
        return evaluate(config, gateway, cache or MemorySamples(), interruption=interruption, show_progress=False)


def timeless(report: Report) -> dict[str, Any]:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    del data["times"]
    return dict(data)


def test_every_sample_has_a_seed_of_its_own_and_a_second_run_is_the_same(bench: Bench, prompt_file: Path) -> None:
    config = config_of(bench, prompt_file, procedures=["standard", "best_of_n:2"], judge="letters")
    report = run(config)
    bodies = bench.completions()
    assert len(bodies) == 2 * 6 * 3  # the seventh line repeats the first
    assert len({body["seed"] for body in bodies}) == len(bodies)
    assert {(body["n"], body["best_of"], body["user"]) for body in bodies} == {(1, 1, "trimtab-evaluate")}
    assert timeless(run(config)) == timeless(report)
    assert timeless(run(config.model_copy(update={"seed": 1}))) != timeless(report)
    assert report.prompts["num"] == 6
    assert report.rewards == {"noise": "1", "letters": "1"}


def test_common_seeds_are_common(bench: Bench, prompt_file: Path) -> None:
    run(config_of(bench, prompt_file, common_seeds=True))
    seeds = [body["seed"] for body in bench.completions()]
    assert len(set(seeds)) == len(seeds) // 2


def test_a_policy_is_what_the_gateway_says_that_it_is(bench: Bench, prompt_file: Path) -> None:
    policies = [
        {"name": "base"},
        {"name": "kind"},
        {"name": "half", "steering": {"adapters": [{"name": "kind", "alpha": 0.5}]}},
        {"name": "both", "model": "kind", "steering": {"adapters": [{"name": "plain"}]}},
    ]
    report = timeless(run(config_of(bench, prompt_file, policies=policies)))
    base, kind, half, both = report["policies"]
    assert (base["model"], base["steering"], base["revision"]) == ("base", None, None)
    assert (kind["model"], kind["revision"]) == ("kind", 1)
    assert kind["steering"]["adapters"] == [{"name": "kind", "version": KIND, "alpha": 1.0}]
    assert (half["model"], half["steering"]["adapters"][0]["alpha"]) == ("base", 0.5)
    assert (both["model"], both["steering"]["adapters"][0]["name"]) == ("kind", "plain")
    with pytest.raises(NotFoundError, match=r"'other'.*there are base, kind"):
        run(config_of(bench, prompt_file, policies=[{"name": "other"}]))


def test_chats_and_token_ids_are_prompts_too(bench: Bench, prompt_file: Path) -> None:
    seen: list[tuple[str, str]] = []

    def seeing(prompt: str, output: str) -> float:
        seen.append((prompt, output))
        return float(len(seen))

    bench.rewards.by_name["noise"].function = seeing
    run(config_of(bench, prompt_file, policies=[{"name": "base"}]))
    assert {prompt for prompt, _ in seen} == {*(f"Question {i}?" for i in range(4)), "Hi", "Hello"}
    assert any("messages" in body for body in bench.completions())


def test_best_of_n_of_the_base_is_where_theory_has_it(bench: Bench, tmp_path: Path) -> None:
    """A reward without ties, 20 prompts of 16 samples: n / (n + 1) and log n - (n - 1) / n for n = 4.

    Against itself by the pool's own ranks, so exactly. Against another draw of the base with errors; four standard
    errors are passed about once in 1,300 seeds by each of the three, were rates of prompts normal (Student's t with 19
    degrees of freedom); the seed and the fake engine are always the same.
    """
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(20)))
    report = run(
        config_of(
            bench,
            prompts,
            policies=[{"name": "base"}, {"name": "again", "steering": {"adapters": []}}],
            procedures=["standard", "best_of_n:4"],
            pairs=[["base@best_of_n:4", "base"], ["again@best_of_n:4", "base"], ["base@best_of_n:4"] * 2],
            samples=16,
            sampling={"max_tokens": 12},
        )
    )
    again, again_best, own, other, same = (rate.win_rate for rate in report.win_rates)
    for estimate, expected in ((again, 1 / 2), (again_best, 1 / 2), (other, 4 / 5)):
        assert estimate.standard_error is not None
        assert 0.005 < estimate.standard_error < 0.06  # of one prompt it is about 0.1 to 0.2
        assert abs(estimate.value - expected) < 4 * estimate.standard_error
    assert own.value == pytest.approx(4 / 5, abs=1e-9)
    assert same.value == pytest.approx(1 / 2, abs=1e-9)
    outcome = next(o for o in report.outcomes if (o.policy, o.procedure) == ("base", "best_of_n:4"))
    assert outcome.kl_to_base.total is not None
    assert outcome.kl_to_base.total.value == pytest.approx(best_of_n_kl_upper_bound(4), abs=1e-9)
    assert outcome.calibrated_reward is not None
    assert outcome.calibrated_reward.value == own.value
    (base, _) = report.policies
    assert base.figures.calibrated_reward.value == pytest.approx(1 / 2, abs=1e-9)
    assert base.figures.calibrated_histogram == pytest.approx([0.1] * 10, abs=1e-9)


def test_kl_is_the_sum_over_the_tokens_of_the_answers(bench: Bench, prompt_file: Path) -> None:
    """Recomputed from the fake engine's own record of every request."""
    report = run(config_of(bench, prompt_file, policies=[{"name": "base"}, {"name": "kind"}]))
    base, kind = (entry.figures.kl_to_base for entry in report.policies)
    assert base.per_sequence.value == 0.0
    assert base.per_sequence_log_ratio is not None
    assert base.per_sequence_log_ratio.value == 0.0
    rollouts = [r for r in bench.gateway.log.rollouts if r.steering and len(r.output_token_ids) == 6]
    assert len(rollouts) == 18
    assert kind.per_sequence.value == pytest.approx(sum(sum(r.kl or ()) for r in rollouts) / 18)
    assert kind.per_token is not None
    assert kind.per_token.value == pytest.approx(kind.per_sequence.value / 6)
    ratios = [sum(r.steered_logprobs or ()) - sum(r.base_logprobs or ()) for r in rollouts]
    assert kind.per_sequence_log_ratio is not None
    assert kind.per_sequence_log_ratio.value == pytest.approx(sum(ratios) / 18)


def test_with_a_temperature_only_what_is_known_is_said(bench: Bench, prompt_file: Path) -> None:
    changes = {"sampling": {"max_tokens": 6, "temperature": 0.7}, "procedures": ["standard", "best_of_n:2"]}
    report = run(config_of(bench, prompt_file, **changes))
    base, kind = (entry.figures.kl_to_base for entry in report.policies)
    assert not report.kl_is_of_sampled_policy
    assert kind.per_sequence_log_ratio is None
    assert kind.per_sequence.value > 0
    best = {o.policy: o.kl_to_base for o in report.outcomes if o.procedure == "best_of_n:2"}
    assert best["kind"].total is None
    assert best["base"].total is not None
    assert base.per_sequence_log_ratio is not None


def test_a_served_procedure_is_drawn_through_the_gateway(bench: Bench, prompt_file: Path) -> None:
    bench.gateway.catalog.add_route(
        "best", steering=(AdapterWeight(name="kind", version=KIND, alpha=1.0),), best_of=5, reward="noise"
    )
    served, as_is = 'served:{"best_of":4,"calibration":{"size":0}}', "served:{}"
    config = config_of(
        bench,
        prompt_file,
        policies=[{"name": "base"}, {"name": "best"}],
        procedures=["standard", served],
        pairs=[[f"best@{as_is}", "base"]],
    )
    report = run(config)
    bodies = bench.completions()
    chosen = [body for body in bodies if body.get("best_of") == 4]
    assert len(chosen) == 2 * 18
    assert all(body["reward"] == "noise" for body in chosen)
    untouched = [body for body in bodies if "best_of" not in body]
    assert len(untouched) == 18
    assert {body["model"] for body in untouched} == {"best"}
    assert not any("reward" in body for body in untouched)
    assert len(bench.gateway.scoring.calls) == len(chosen) + len(untouched)
    by_label = {(o.policy, o.procedure): o for o in report.outcomes}
    gained = by_label["base", served].mean_reward.value
    assert abs(gained - 4 / 5) < 0.154  # four standard errors: the largest of 4 has variance 2/75, over 18 samples
    assert by_label["base", served].kl_to_base.total is None


def test_what_was_drawn_is_not_drawn_again(bench: Bench, prompt_file: Path, tmp_path: Path) -> None:
    """The run is stopped in its middle; then it goes on, is repeated, and is widened by a policy."""
    interruption = Interruption()
    bench.on_completion = lambda number: interruption.request("released") if number == 15 else None
    config = config_of(bench, prompt_file)
    work_dir = tmp_path / "work"
    with SampleFile(work_dir) as cache, pytest.raises(TrainingInterrupted):
        run(config, cache, interruption)
    drawn = len(bench.completions())
    assert drawn < 36
    bench.bodies.clear()
    with SampleFile(work_dir) as cache:
        resumed = run(config, cache)
    assert len(bench.completions()) == 36 - drawn
    bench.bodies.clear()
    with SampleFile(work_dir) as cache:
        again = run(config, cache)
        wider = config_of(bench, prompt_file, samples=4)
        assert not bench.completions()
        run(wider, cache)
    assert len(bench.completions()) == 12
    assert timeless(resumed) == timeless(again) == timeless(run(config))


def test_a_new_version_on_the_route_is_drawn_anew(bench: Bench, prompt_file: Path, tmp_path: Path) -> None:
    config = config_of(bench, prompt_file)
    with SampleFile(tmp_path) as cache:
        run(config, cache)
        bench.bodies.clear()
        weight = AdapterWeight(name="kind", version=KIND, alpha=2.0)
        bench.gateway.catalog.add_route("kind", steering=(weight,))
        run(config, cache)
    assert {body["model"] for body in bench.completions()} == {"kind"}


def test_a_route_that_moves_in_the_middle_is_an_error(bench: Bench, prompt_file: Path) -> None:
    def move(number: int) -> None:
        if number == 30:
            weight = AdapterWeight(name="kind", version=KIND, alpha=2.0)
            bench.gateway.catalog.add_route("kind", steering=(weight,))

    bench.on_completion = move
    with pytest.raises(ConflictError, match="'kind' stands for changed"):
        run(config_of(bench, prompt_file))


def test_a_busy_gateway_is_asked_again(bench: Bench, prompt_file: Path) -> None:
    def answer_busy(number: int) -> None:
        if number == 15:
            bench.answers += [busy(), busy()]

    bench.on_completion = answer_busy
    report = run(config_of(bench, prompt_file))
    assert len(bench.completions()) == 36 + 2
    bench.on_completion = lambda number: None
    assert timeless(run(config_of(bench, prompt_file))) == timeless(report)


def test_a_failing_reward_is_an_error_of_the_run(bench: Bench, prompt_file: Path) -> None:
    bench.rewards.by_name["letters"].error = RewardError("the reward model is down")
    with pytest.raises(RewardError, match="down"):
        run(config_of(bench, prompt_file, judge="letters"))
    assert not bench.completions()  # seen before anything was drawn
    with pytest.raises(NotFoundError):
        run(config_of(bench, prompt_file, reward="unknown"))

    def fail_later(number: int) -> None:
        bench.rewards.by_name["noise"].error = RewardError("the reward model is down")

    bench.on_completion = lambda number: fail_later(number) if number == 15 else None
    with pytest.raises(RewardError, match="down"):
        run(config_of(bench, prompt_file))


def test_a_reward_that_changes_in_the_middle_is_an_error(bench: Bench, prompt_file: Path) -> None:
    def change(number: int) -> None:
        if number == 15:
            bench.rewards.by_name["noise"].version = "2"

    bench.on_completion = change
    with pytest.raises(RewardError, match="from version 1 to 2"):
        run(config_of(bench, prompt_file))


def test_equal_answers_are_scored_once(bench: Bench, prompt_file: Path) -> None:
    run(config_of(bench, prompt_file, sampling={"max_tokens": 1}, samples=24, policies=[{"name": "base"}]))
    # The fake base says one of 16 words, so there are at most 16 different answers to each of 6 prompts, and a probe.
    assert bench.rewards.by_name["noise"].num_scored <= 6 * 16 + 1


def test_a_refused_request_is_an_error_of_the_run(bench: Bench, prompt_file: Path) -> None:
    procedure = 'served:{"strategy":"no such"}'
    with pytest.raises(TrimtabError, match="'no such'"):
        run(config_of(bench, prompt_file, procedures=[procedure]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1 needs `prompt`"),
        ('{"prompt": ""}', "line 1 needs `prompt`"),
        ('{"prompt_token_ids": [true]}', "line 1 needs"),
        ('{"messages": [{"role": "user", "content": [{}]}]}', "line 1 needs"),
        ("{", "line 1 is not JSON"),
        ("", "holds no prompts"),
    ],
)
def test_malformed_prompts_are_named_by_their_line(bench: Bench, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TrimtabError, match=message):
        run(config_of(bench, path))
    with pytest.raises(TrimtabError, match="cannot be read"):
        run(config_of(bench, tmp_path / "none.jsonl"))


def test_the_command_writes_all_that_it_is_asked_for(
    bench: Bench, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [
        *("--gateway", bench.url, "--prompts", str(prompt_file), "--reward", "noise", "--judge", "letters"),
        *("--policy", "base", "--policy", "kind", "--policy", 'half={"adapters": [{"name": "kind", "alpha": 0.5}]}'),
        *("--procedure", "standard", "--procedure", "best_of_n:2", "--procedure", "worst_of_n:2"),
        *("--procedure", 'served:{"best_of":2}', "--pair", "base@best_of_n:2", "kind"),
        *("--samples", "3", "--max-tokens", "4", "--work-dir", str(tmp_path / "work")),
    ]
    outputs = {ending: tmp_path / "out" / f"report.{ending}" for ending in ("json", "csv", "png", "svg")}
    files = ["--json", str(outputs["json"]), "--csv", str(outputs["csv"]), "--plot", str(outputs["png"])]
    assert cli.evaluate([*arguments, *files]) == 0
    printed = capsys.readouterr().out
    assert "base (reference)" in printed
    assert "kind @ best_of_n:2" in printed
    assert "With fewer than 20 prompts" in printed
    report = json.loads(outputs["json"].read_text())
    assert report["schema_version"] == 1
    assert [policy["name"] for policy in report["policies"]] == ["base", "kind", "half"]
    assert len(report["outcomes"]) == 4 * 3
    assert len(report["win_rates"]) == 4 * 2 + 1
    assert len(report["differences"]) == 4
    header, *lines = outputs["csv"].read_text().splitlines()
    assert header.startswith("policy,procedure,opponent,opponent_procedure,judged_by,win_rate")
    assert len(lines) == 2 * 9
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    drawn = len(bench.completions())
    assert cli.evaluate([*arguments, "--temperature", "0.5", "--plot", str(outputs["svg"])]) == 0
    assert "before temperature" in outputs["svg"].read_text() or "before temperature" in capsys.readouterr().out
    assert len(bench.completions()) == 2 * drawn


def test_bad_input_is_one_line_on_standard_error(
    bench: Bench, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.evaluate(["--help"]) == 0
    assert cli.evaluate(["--samples", "many"]) == 2
    capsys.readouterr()
    assert cli.evaluate(["--gateway", bench.url]) == 1
    assert "prompts: Field required" in capsys.readouterr().err
    named = ["--gateway", bench.url, "--prompts", str(prompt_file), "--policy", "base", "--reward", "unknown"]
    assert cli.evaluate(named) == 1
    errors = capsys.readouterr().err
    assert "trimtab evaluate: POST /admin/rewards/unknown/score" in errors
