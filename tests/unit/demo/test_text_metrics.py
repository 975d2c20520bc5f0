import math

import pytest

from trimtab_training.demo import text_metrics


def test_the_interval_is_196_standard_errors_wide_on_each_side() -> None:
    # s of (1, 2, 3) is 1; 1.959964 / sqrt(3)
    interval = text_metrics.mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(1.1315857)


def test_one_value_has_an_unknown_spread_and_none_has_no_mean() -> None:
    assert text_metrics.mean_interval([5.0]) == (5.0, math.inf)
    with pytest.raises(ValueError, match="no values"):
        text_metrics.mean_interval([])


def test_distinct_2_pools_word_pairs_over_all_texts() -> None:
    # a b, b c | a b, b d -> 3 different of 4
    assert text_metrics.distinct_n(["a b, c", "A b d!"]) == 0.75
    assert math.isnan(text_metrics.distinct_n(["one", ""]))


def test_repetition_is_within_texts_only() -> None:
    # "a b a b" has pairs ab, ba, ab: a third repeats; "a b" repeats nothing although the other text has it
    assert text_metrics.repetition(["a b a b", "a b", "x"]) == pytest.approx(1 / 6)
    assert math.isnan(text_metrics.repetition(["x"]))


def test_perplexity_and_token_mean_weigh_tokens_not_texts() -> None:
    values = [[math.log(0.5)] * 3, [math.log(0.125)], []]
    # (3 log 2 + 3 log 2) / 4 = 1.5 log 2
    assert text_metrics.perplexity(values) == pytest.approx(2**1.5)
    assert text_metrics.token_mean([[1.0, 2.0], [6.0]]) == 3.0
    assert math.isnan(text_metrics.perplexity([[]]))


def test_the_best_of_n_bound_is_zero_for_one_and_log_n_minus_n_minus_1_over_n() -> None:
    assert text_metrics.best_of_n_kl_bound(1) == 0.0
    assert text_metrics.best_of_n_kl_bound(8) == pytest.approx(2.0794415 - 0.875)
    with pytest.raises(ValueError, match="n >= 1"):
        text_metrics.best_of_n_kl_bound(0)
