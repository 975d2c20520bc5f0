import pytest

from trimtab_training.objectives.controllers import Coefficient


@pytest.mark.parametrize(
    ("observed", "is_bonus", "factor"),
    [
        (1.1, False, 1 + 0.1 * 64 / 2500),
        (5.0, False, 1 + 0.2 * 64 / 2500),  # clipped
        (0.0, False, 1 - 0.2 * 64 / 2500),
        (1.1, True, 1 - 0.1 * 64 / 2500),
    ],
)
def test_a_coefficient_moves_against_its_error(observed: float, is_bonus: bool, factor: float) -> None:
    coefficient = Coefficient(0.05, target=1.0, is_bonus=is_bonus)
    coefficient.follow(observed, 64)
    assert coefficient.value == pytest.approx(0.05 * factor)


def test_without_a_target_it_stays() -> None:
    coefficient = Coefficient(0.05)
    coefficient.follow(100.0, 64)
    assert coefficient.value == 0.05
