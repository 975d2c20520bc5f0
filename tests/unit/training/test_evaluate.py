from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_adapters.contract.errors import EngineError
from trimtab_training.config import SamplingConfig
from trimtab_training.evaluation.procedures import STANDARD, Chosen
from trimtab_training.evaluation.token_sums import sum_tokens
from trimtab_training.evaluation_config import EvaluationConfig
from trimtab_training.gateway import ScoreReply
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.recipes.evaluate import Evaluation, evaluate
from trimtab_training.rewards import Scorer
from trimtab_training.rollouts import Sample

PLAIN = SamplingConfig(max_tokens=2)


@pytest.fixture(scope="module")
def policy(model_dirs: dict[str, Path]) -> TailoredPolicy:
    base, adapter = (
        AutoModelForCausalLM.from_pretrained(model_dirs[name], dtype=torch.float32) for name in ("base", "adapter")
    )
    return TailoredPolicy(base, adapter, alpha=1.0, num_known=64)


class Scripted:
    """Gives each policy's outputs in turn, the same for every prompt, and notes what it was asked for."""

    def __init__(self, base: Sequence[tuple[int, ...]], steered: Sequence[tuple[int, ...]]) -> None:
        self.outputs = {False: list(base), True: list(steered)}
        self.asked: list[tuple[bool, int, int]] = []

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        num_per_prompt: int,
        seed: int,
        steered: bool,
        on_done: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        self.asked.append((steered, num_per_prompt, seed))
        taken, self.outputs[steered] = (
            self.outputs[steered][:num_per_prompt],
            self.outputs[steered][num_per_prompt:],
        )
        return [[Sample(p.text, (1,), " ".join(f"t{t}" for t in ids), ids) for ids in taken] for p in prompts]


class Longest:
    """Reward: minus the share of token 7, so that it falls where the other one rises."""

    name = "longest"

    def score(self, inputs: Any) -> ScoreReply:
        shares = [item.output.split().count("t7") / max(1, len(item.output.split())) for item in inputs]
        return ScoreReply(rewards=[-share for share in shares], version="2")


def run(
    source: Scripted,
    policy: TailoredPolicy,
    scorers: Sequence[Scorer],
    *,
    procedure: Chosen = STANDARD,
    sampling: SamplingConfig = PLAIN,
    num_prompts: int = 5,
    **config: Any,
) -> Evaluation:
    prompts = [Prompt(f"t{i}") for i in range(num_prompts)]
    settings = EvaluationConfig(**{"max_prompts": 4, "num_per_prompt": 2, "num_resamples": 100, **config})
    return evaluate(
        source,
        scorers,
        policy,
        prompts,
        adapter_prefix=(5,),
        procedure=procedure,
        sampling=sampling,
        config=settings,
        seed=0,
    )


def test_token_sums_are_those_of_single_rows(policy: TailoredPolicy) -> None:
    samples = [Sample("p", (1, 2), "o", tuple(range(3, 4 + n))) for n in range(40)] + [
        Sample("p", (1,), "", ()),
        Sample("p", (1,), "x", (64,)),
    ]
    whole = sum_tokens(policy, samples, (5,))
    single = [sum_tokens(policy, [sample], (5,)) for sample in samples]
    assert whole.num_tokens.tolist() == [*range(1, 41), 0, 0]
    assert whole.num_unread == 2
    for name in ("base_logprob", "steered_logprob", "kl", "base_entropy", "steered_entropy"):
        each = [float(getattr(sums, name)[0]) for sums in single]
        assert getattr(whole, name) == pytest.approx(each, rel=1e-4, abs=1e-4), name
    assert whole.kl[:40].min() > 1e-4


def test_token_sums_are_the_models_own(policy: TailoredPolicy) -> None:
    (sums,) = [sum_tokens(policy, [Sample("p", (1, 2), "o", (3, 4, 7))], (5,))]
    with torch.no_grad():
        output = policy.forward([(1, 2)], [(3, 4, 7)], [(5,)])
    steered, base = (torch.log_softmax(z[0], dim=-1) for z in (output.steered_logits, output.base_logits))
    ids = torch.tensor([[3], [4], [7]])
    expected = [
        base.gather(1, ids).sum(),
        steered.gather(1, ids).sum(),
        (steered.exp() * (steered - base)).sum(),
        -(base.exp() * base).sum(),
        -(steered.exp() * steered).sum(),
    ]
    found = [sums.base_logprob, sums.steered_logprob, sums.kl, sums.base_entropy, sums.steered_entropy]
    assert [float(value[0]) for value in found] == pytest.approx([float(value) for value in expected], rel=1e-4)


def test_base_and_steered_are_compared_on_the_same_prompts(policy: TailoredPolicy, lucky_scorer: Scorer) -> None:
    source = Scripted([(7, 8)] * 2, [(7, 7)] * 2)  # rewards 1/2 and 1
    found = run(source, policy, [lucky_scorer])
    assert [(steered, num) for steered, num, _ in source.asked] == [(False, 2), (True, 2)]
    assert source.asked[0][2] != source.asked[1][2], "outputs of a policy must not share the noise of the other's"
    result = found.figures.to_json()
    assert (result["num_prompts"], result["num_per_prompt"], result["procedure"]) == (4, 2, "standard")
    assert (result["base"]["mean_reward"], result["steered"]["mean_reward"]) == (0.5, 1.0)
    assert result["reward_difference"] == 0.5
    assert result["reward_difference_interval"] == [0.5, 0.5]
    assert result["win_rate"] == 1.0
    assert result["win_rate_interval"] == pytest.approx([0.025 ** (1 / 4), 1.0])  # four of four, exactly
    with torch.no_grad():
        output = policy.forward([(1,)], [(7, 7)], [(5,)])
    assert result["kl_per_token"] == pytest.approx(float(output.kl().mean()), rel=1e-5)
    assert result["kl_per_output"] == pytest.approx(float(output.kl().sum()), rel=1e-5)
    of_base, of_steered = (entry.figures.kl_to_base for entry in found.comparison.policies)
    assert (of_base.per_sequence.value, of_steered.per_sequence.value) == (0.0, result["kl_per_output"])
    assert of_steered.per_sequence_log_ratio is not None
    log_ratio = float((output.token_logprobs()[0] - output.token_logprobs()[1]).sum())
    assert of_steered.per_sequence_log_ratio.value == pytest.approx(log_ratio, rel=1e-4)
    steered_nll = -float(output.token_logprobs()[1].mean())
    assert result["steered"]["base_perplexity"] == pytest.approx(np.exp(steered_nll), rel=1e-5)
    with torch.no_grad():
        base_nll = -float(policy.forward([(1,)], [(7, 8)], [(5,)]).token_logprobs()[1].mean())
    sums = sum_tokens(policy, [Sample("p", (1,), "o", (7, 8)), Sample("p", (1,), "o", (7, 7))], (5,))
    entropies = (float(sums.base_entropy[0]) / 2, float(sums.steered_entropy[1]) / 2)
    assert (result["base"]["entropy_per_token"], result["steered"]["entropy_per_token"]) == pytest.approx(entropies)
    assert result["perplexity_ratio"] == pytest.approx(np.exp(steered_nll - base_nll), rel=1e-5)
    assert result["distinct_1_ratio"] == pytest.approx((1 / 4) / (2 / 4))
    assert (result["length_difference"], result["length_ratio"], result["refusal_shift"]) == (0.0, 1.0, 0.0)
    assert result["steered"]["repeat_rate"] == 1.0
    assert result["second_reward_difference"] is None
    assert result["second_reward_difference_interval"] is None


def test_the_inference_time_win_rate_is_of_the_served_procedure(policy: TailoredPolicy, lucky_scorer: Scorer) -> None:
    """Rewards 0, 0, 1/2 of the base and 0, 1/2, 1 of the steered policy for every prompt.

    One sample each: 0 wins 1/3 (two ties), 1/2 wins 5/6, 1 wins always. The best of two is 1/2 in 2 of 3 pairs of the
    base's, else 0, and 1 in 2 of 3 pairs of the steered policy's, else 1/2: that wins 1/3 and ties 2/3.
    """
    source = Scripted([(8, 8), (8, 9), (7, 8)], [(8, 8), (7, 8), (7, 7)])
    found = run(source, policy, [lucky_scorer], procedure=Chosen("best", 2))
    result = found.figures.to_json()
    assert (result["procedure"], result["num_per_prompt"]) == ("best_of_n:2", 3)
    assert result["win_rate"] == pytest.approx((1 / 3 + 5 / 6 + 1) / 3)
    assert result["served_win_rate"] == pytest.approx(2 / 3 + 1 / 3 * (1 / 3 + 0.5 * 2 / 3))
    assert result["reward_difference"] == pytest.approx(1 / 2 - 1 / 6)
    assert result["served_reward_difference"] == pytest.approx(5 / 6 - 1 / 3)
    assert [rate.procedure for rate in found.comparison.win_rates] == ["standard", "best_of_n:2"]
    assert found.comparison.rewards == {"lucky": "1"}


def test_pools_larger_than_a_request_are_drawn_in_parts(policy: TailoredPolicy, lucky_scorer: Scorer) -> None:
    outputs = [(7 + i % 2, 8) for i in range(21)]
    source = Scripted(outputs, outputs)
    found = run(source, policy, [lucky_scorer], procedure=Chosen("best", 20))
    assert [num for _, num, _ in source.asked] == [16, 5, 16, 5]
    assert len({seed for _, _, seed in source.asked}) == 4
    assert [sample.output_token_ids for sample in found.base.samples[3]] == outputs


def test_a_second_reward_is_followed_with_the_choices_of_the_first(
    policy: TailoredPolicy, lucky_scorer: Scorer
) -> None:
    source = Scripted([(8, 8), (8, 7)], [(7, 7), (8, 7)])
    result = run(source, policy, [lucky_scorer, Longest()]).figures.to_json()
    assert result["reward_difference"] == pytest.approx(0.5)
    assert result["second_reward_difference"] == pytest.approx(-0.5)
    assert result["base"]["mean_second_reward"] == pytest.approx(-0.25)
    assert result["steered"]["reward_correlation"] == pytest.approx(-1.0)


def test_kl_of_warped_samples_is_said_to_be_another(policy: TailoredPolicy, lucky_scorer: Scorer) -> None:
    outputs = [(7, 8)] * 2
    warped = SamplingConfig(max_tokens=2, top_p=0.9)
    found = run(Scripted(outputs, outputs), policy, [lucky_scorer], sampling=warped)
    assert not found.figures.kl_is_of_sampled_policy
    assert not found.comparison.kl_is_of_sampled_policy


def test_one_prompt_has_no_interval(policy: TailoredPolicy, lucky_scorer: Scorer) -> None:
    source = Scripted([(7, 8)] * 2, [(7, 7)] * 2)
    result = run(source, policy, [lucky_scorer], num_prompts=1).figures.to_json()
    assert result["reward_difference"] == 0.5
    assert result["reward_difference_interval"] is None


def test_a_source_that_gives_too_few_outputs_is_an_error(policy: TailoredPolicy, lucky_scorer: Scorer) -> None:
    with pytest.raises(EngineError, match="got others"):
        run(Scripted([(7, 8)], [(7, 7)]), policy, [lucky_scorer])
