"""From what an API shows to a row of base logits, and from steered logits to a token; figures by hand."""

import math

import pytest
import torch
from scipy import stats

from trimtab_adapters.contract.sampling import SamplingRules, TopLogprobs
from trimtab_adapters.in_process.sampling import base_row, constrained, sample

TOP = TopLogprobs((3, 1), (math.log(0.5), math.log(0.3)))
NONE = -math.inf


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def sampled(logits: torch.Tensor, rules: SamplingRules, uniform: float, counts: dict[int, int] | None = None) -> int:
    return sample(logits, rules, counts or {}, uniform)


def possible(logits: torch.Tensor, rules: SamplingRules, counts: dict[int, int] | None = None) -> set[int]:
    return {sampled(logits, rules, number / 1000, counts) for number in range(1000)}


def test_exclude_leaves_nothing_but_the_tokens_that_were_shown() -> None:
    assert base_row(TOP, 6, "exclude").tolist() == pytest.approx([NONE, math.log(0.3), NONE, math.log(0.5), NONE, NONE])


def test_residual_spreads_the_rest_evenly_and_makes_a_whole_distribution() -> None:
    row = base_row(TOP, 6, "residual")
    assert row.exp().tolist() == pytest.approx([0.05, 0.3, 0.05, 0.5, 0.05, 0.05])  # (1 - 0.8) / (6 - 2)
    assert float(row.exp().sum()) == pytest.approx(1.0)


def test_residual_leaves_nothing_where_rounding_makes_the_sum_one_or_more() -> None:
    row = base_row(TopLogprobs((0, 1), (math.log(0.6), math.log(0.4 + 1e-9))), 4, "residual")
    assert row[2:].tolist() == [NONE, NONE]


def test_residual_of_a_whole_vocabulary_divides_by_nothing() -> None:
    assert base_row(TopLogprobs((1, 0), (math.log(0.7), math.log(0.2))), 2, "residual").exp().tolist() == pytest.approx(
        [0.2, 0.7]
    )


def test_biases_are_added_and_excluded_tokens_stay_excluded() -> None:
    row = constrained(base_row(TOP, 5, "exclude"), SamplingRules(logit_bias={1: 2.0, 2: 50.0}), 0)
    assert row.tolist() == pytest.approx([NONE, math.log(0.3) + 2, NONE, math.log(0.5), NONE])


def test_tokens_that_are_not_allowed_are_excluded() -> None:
    row = constrained(base_row(TOP, 5, "residual"), SamplingRules(allowed_token_ids=frozenset({0, 3})), 0)
    assert torch.isfinite(row).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(("num_sampled", "can_end"), [(0, False), (1, False), (2, True)])
def test_ends_are_excluded_until_the_minimum(num_sampled: int, can_end: bool) -> None:
    rules = SamplingRules(min_tokens=2, ending_ids=frozenset({3}))
    assert bool(torch.isfinite(constrained(base_row(TOP, 5, "exclude"), rules, num_sampled)[3])) is can_end


def test_greedy_takes_the_most_probable_token_whatever_the_dice_say() -> None:
    assert possible(logs(0.2, 0.5, 0.3), SamplingRules(temperature=0.0)) == {1}


def test_greedy_comes_after_penalties() -> None:
    """0.5 against 0.3: log(0.5) - 0.3 * 2 - 0.1 is below log(0.3)."""
    rules = SamplingRules(temperature=0.0, frequency_penalty=0.3, presence_penalty=0.1)
    assert sampled(logs(0.2, 0.5, 0.3), rules, 0.0) == 1
    assert sampled(logs(0.2, 0.5, 0.3), rules, 0.0, {1: 2}) == 2


def test_a_frequency_penalty_grows_with_the_count_and_a_presence_penalty_does_not() -> None:
    logits = logs(0.5, 0.3)  # log(0.5 / 0.3) = 0.51
    assert sampled(logits, SamplingRules(temperature=0.0, frequency_penalty=0.2), 0.0, {0: 2}) == 0
    assert sampled(logits, SamplingRules(temperature=0.0, frequency_penalty=0.2), 0.0, {0: 3}) == 1
    assert sampled(logits, SamplingRules(temperature=0.0, presence_penalty=0.2), 0.0, {0: 3}) == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = logs(0.5, 0.3, 0.15, 0.05)
    assert possible(logits, SamplingRules(top_p=0.5)) == {0}
    assert possible(logits, SamplingRules(top_p=0.51)) == {0, 1}
    assert possible(logits, SamplingRules(top_p=0.81)) == {0, 1, 2}
    assert possible(logits, SamplingRules()) == {0, 1, 2, 3}


def test_top_k_and_min_p_cut_before_top_p_counts() -> None:
    logits = logs(0.4, 0.3, 0.2, 0.1)
    assert possible(logits, SamplingRules(top_k=2)) == {0, 1}
    assert possible(logits, SamplingRules(min_p=0.6)) == {0, 1}  # 0.2 is half of 0.4
    # Of the first two, renormalised, the first alone has 4 / 7 = 0.571; of all it would have 0.4.
    assert possible(logits, SamplingRules(top_k=2, top_p=0.55)) == {0}


def test_temperature_comes_before_the_cuts() -> None:
    """At temperature 1/2 the probabilities 0.5, 0.3, 0.2 become 25, 9, 4 of 38: the first has 0.66."""
    assert possible(logs(0.5, 0.3, 0.2), SamplingRules(temperature=0.5, top_p=0.6)) == {0}
    assert possible(logs(0.5, 0.3, 0.2), SamplingRules(temperature=1.0, top_p=0.6)) == {0, 1}


def test_frequencies_are_the_probabilities() -> None:
    """Evenly spaced dice give frequencies within one of the probabilities: nothing is left to chance."""
    counts = [0, 0, 0]
    for number in range(10_000):
        counts[sampled(logs(0.2, 0.5, 0.3), SamplingRules(), (number + 0.5) / 10_000)] += 1
    assert counts == pytest.approx([2000, 5000, 3000], abs=1)


def test_the_largest_die_never_takes_an_excluded_token() -> None:
    logits = torch.cat((logs(0.6, 0.4), torch.tensor([NONE, NONE])))
    assert sampled(logits, SamplingRules(), math.nextafter(1.0, 0.0)) == 1
    assert sampled(logits, SamplingRules(top_k=1), math.nextafter(1.0, 0.0)) == 0


def test_sampling_at_a_temperature_follows_the_tempered_distribution() -> None:
    """Chi-square with 3 degrees of freedom; fixed seeds, and fresh ones would fail a right sampler once in 1,000."""
    logits = logs(0.4, 0.3, 0.2, 0.1)
    dice = torch.Generator().manual_seed(3)
    draws = [
        sampled(logits, SamplingRules(temperature=0.7), float(u)) for u in torch.rand(4000, generator=dice).tolist()
    ]
    expected = torch.softmax(logits / 0.7, dim=-1) * 4000
    observed = torch.bincount(torch.tensor(draws), minlength=4)
    assert stats.chi2.sf(float(((observed - expected) ** 2 / expected).sum()), 3) > 1e-3
