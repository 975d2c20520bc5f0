"""Runs that are cancelled in any phase, or killed while they draw, leave nothing behind in the gateway."""

import shutil
from typing import Any

import pytest

from logged_runs import gateway_config, logged
from trimtab_training.interruption import Interruption, TrainingInterrupted
from trimtab_training.recipes.train import train

PHASES = ["reading the log", "calibrating", "drawing rollouts", "training", "evaluating", "publishing"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_is_cancelled_in_every_phase(make_config: Any, gateway: Any, phase: str) -> None:
    """It draws and scores nothing more, switches no route, leaves no version in the making, and can be resumed."""
    gateway.rollouts = logged(40)
    interruption = Interruption()
    num_before: list[int] = []

    def cancel(progress: Any) -> None:
        if progress["phase"] == phase and not num_before:
            interruption.request("cancelled")
            num_before.append(len(gateway.requests))

    config = gateway_config(
        make_config, reward={"source": "gateway", "transform": {"kind": "calibrated", "num_reference": 3}}
    )
    with gateway.client(interruption=interruption) as client, pytest.raises(TrainingInterrupted) as stopped:
        train(config, gateway=client, interruption=interruption, report=cancel)
    assert stopped.value.reason == "cancelled"
    later = {path for _, path, _ in gateway.requests[num_before[0] :]}
    assert not {path for path in later if path == "/v1/completions" or path.endswith(("/score", "/activate"))}
    assert gateway.routes == {}
    in_the_making = {v for v, manifest in gateway.versions.items() if manifest.name.endswith(".training")}
    assert in_the_making == set(gateway.retired)
    with gateway.client() as client:
        assert train(config, gateway=client, resume=True).num_steps == 10
    assert set(gateway.routes) == {"kind"}


def test_versions_that_a_killed_run_drew_with_are_retired_by_the_next_attempt(make_config: Any, gateway: Any) -> None:
    gateway.rollouts = logged(40)
    config = gateway_config(make_config, checkpoint={"every": 2})

    def die(path: str) -> None:
        if path == "/v1/completions":
            shutil.copytree(config.output_dir, killed)
            raise KeyboardInterrupt

    killed = config.output_dir.parent / "killed"
    gateway.on_request = die
    with gateway.client() as client, pytest.raises(KeyboardInterrupt):
        train(config, gateway=client)
    ((version, _),) = gateway.versions.items()
    (left,) = (killed / "intermediate").iterdir()
    (left.parent / ".tmp-half").mkdir()
    gateway.retired.clear()  # a process that is killed does not tidy up
    gateway.on_request = lambda path: None
    again = config.model_copy(update={"output_dir": killed})
    with gateway.client() as client:
        train(again, gateway=client, resume=True)
    assert gateway.retired[0] == version
    assert list((killed / "intermediate").iterdir()) == []
