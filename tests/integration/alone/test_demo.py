"""The whole loop as a user runs it: record, train, publish, swap in, and a reward that has risen."""

import json
import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engine_process import engine_environment, free_port

pytestmark = pytest.mark.engine


def children_of(port: int) -> list[int]:
    """Processes whose command line names the demonstration's port."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"--port {port}" in " ".join(process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


@pytest.mark.timeout(900)
def test_the_demonstration_raises_the_reward_of_held_out_prompts(tmp_path: Path) -> None:
    """Steered against base on 120 held-out prompts: the 95 % interval of the difference lies above 0.

    The difference of two independent means has the half width sqrt(a² + b²). Without any effect the lower end would
    lie above 0 once in 40 runs; seeds of world, models and training are fixed.
    """
    port, result = free_port(), tmp_path / "result.json"
    arguments = [
        "--exit",
        "--port",
        str(port),
        "--json",
        str(result),
        "--work-dir",
        str(tmp_path / "work"),
        "--prompts=120",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "trimtab_server.cli", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=engine_environment(),
        check=False,
    )
    logs = "".join(path.read_text(errors="replace")[-3000:] for path in (tmp_path / "work").glob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs
    assert children_of(port) == [], "nothing is left running"
    figures = json.loads(result.read_text())
    rows = {row["system"]: row for row in figures["systems"]}
    assert list(rows) == ["base", "steered", "base, best of 8", "steered, best of 8"]
    for name, row in rows.items():
        assert name in done.stdout
        assert row["num_prompts"] == 120
    base, steered = rows["base"], rows["steered"]
    difference = steered["mean_reward"] - base["mean_reward"]
    half_width = math.hypot(steered["reward_interval_half_width"], base["reward_interval_half_width"])
    assert difference - half_width > 0.0, (difference, half_width)
    assert base["kl_per_token"] == 0.0 < steered["kl_per_token"]
    best = rows["base, best of 8"]
    assert best["mean_reward"] - best["reward_interval_half_width"] > base["mean_reward"]
    assert best["tokens_per_answer"] > 4 * base["tokens_per_answer"], "usage counts every candidate"
    assert figures["swap"]["spanning_streams"] > 0
    assert figures["swap"]["failed"] == 0
    print(done.stdout)  # noqa: T201 - shown when the test is run with -s
