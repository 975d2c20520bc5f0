import numpy as np
import pytest

from trimtab_training.evaluation.guides import best_of_n_curve, optimum_curve
from trimtab_training.evaluation.procedures import STANDARD, Chosen


@pytest.mark.parametrize(("n", "kl"), [(2, 0.193147), (4, 0.636294), (16, 1.835089)])
def test_best_of_n_lies_on_its_curve(n: int, kl: float) -> None:
    """The table of the logarithmic transform, which is the best-of-n policy; 1e-4 is what interpolation may lose."""
    assert np.interp(kl, *best_of_n_curve(3.0)) == pytest.approx(n / (n + 1), abs=1e-4)


@pytest.mark.parametrize(
    ("chosen", "kl", "win"),
    [  # the column "optimum" of the table at matched KL, printed to four digits
        (STANDARD, 0.5, 0.7737),
        (Chosen("best", 4), 0.1, 0.7059),
        (Chosen("best", 8), 0.5, 0.9299),
        (Chosen("worst", 2), 0.25, 0.7671),
        (Chosen("worst", 8), 0.5, 0.9929),
    ],
)
def test_the_optimum_lies_on_its_curve(chosen: Chosen, kl: float, win: float) -> None:
    """To 5e-4: curves are drawn by straight lines between points."""
    assert np.interp(kl, *optimum_curve(chosen, 1.0)) == pytest.approx(win, abs=5e-4)


@pytest.mark.parametrize("largest_kl", [0.5, 4.0, 60.0])
def test_curves_rise_and_end_where_the_axis_does(largest_kl: float) -> None:
    for kls, wins in (best_of_n_curve(largest_kl), optimum_curve(Chosen("best", 4), largest_kl)):
        assert (kls[0], wins[0]) == (0.0, 0.5)
        assert max(kls) <= largest_kl
        assert np.all(np.diff(kls) > 0)
        assert np.all(np.diff(wins) > -1e-12)  # rounding, where all is won
        assert wins[-1] <= 1
