import time

import pytest

from trimtab_training.interruption import Interruption, TrainingInterrupted


def test_the_first_reason_counts() -> None:
    interruption = Interruption()
    interruption.check()
    interruption.request("cancelled")
    interruption.request("released")
    with pytest.raises(TrainingInterrupted) as stopped:
        interruption.check()
    assert stopped.value.reason == "cancelled"


def test_a_lease_that_ran_out_stops_the_run_although_nobody_asked() -> None:
    interruption = Interruption()
    interruption.expire_at(time.monotonic() + 60.0)
    interruption.check()
    interruption.expire_at(time.monotonic() + 0.05)
    interruption.check()
    with pytest.raises(TrainingInterrupted, match="lost"):
        interruption.wait(0.1)


def test_a_request_ends_a_wait() -> None:
    interruption = Interruption()
    interruption.request("released")
    began = time.monotonic()
    with pytest.raises(TrainingInterrupted):
        interruption.wait(60.0)
    assert time.monotonic() - began < 30.0
