"""`/admin/selection-caps` over HTTP, and the commands on top of it."""

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from fake_gateway import serving
from trimtab_server import cli
from turning_log import rollout

pytestmark = pytest.mark.anyio

Bench = Any
Run = Callable[..., Coroutine[Any, Any, str]]


async def fill(bench: Bench, prompts: int = 24) -> None:
    """Outputs of 1 to 8 letters: `length` prefers the longest, `brevity` those of four."""
    await bench.log.append(
        [rollout(f"{p}-{i}", p, output_text="x" * (1 + (p + i) % 8)) for p in range(prompts) for i in range(8)]
    )


@pytest.fixture
async def run(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Run]:
    """Runs one command against the gateway and returns what it printed."""
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "admin-secret")
    async with serving(bench.app) as url:
        monkeypatch.setenv("TRIMTAB_URL", url)

        async def run(*arguments: str, status: int = 0) -> str:
            capsys.readouterr()
            found = await anyio.to_thread.run_sync(cli.main, list(arguments))
            output = capsys.readouterr()
            assert found == status, output
            return output.err if status else output.out

        yield run


async def test_a_cap_is_measured_stored_and_listed(bench: Bench) -> None:
    await fill(bench)
    cap = await bench.call("POST", "selection-caps", json={"proxy": "length", "gold": "brevity"})
    assert (cap["proxy"], cap["gold"], cap["base_model"]) == ("length@7", "brevity@2", "base")
    assert (cap["num_prompts"], cap["num_samples"], len(cap["curve"])) == (24, 192, 8)
    # Each pool holds the lengths 1 to 8 once: brevity 1/4 1/2 3/4 1 3/4 1/2 1/4 0, mean 1/2; the longest of 8 has 0.
    assert cap["curve"][0]["gold"] == pytest.approx(0.5)
    assert cap["curve"][7]["gold"] == pytest.approx(0.0)
    # The longest of two is i with probability (i-1)/28.
    expected = sum((i - 1) / 28 * (1 - abs(i - 4) / 4) for i in range(1, 9))
    assert cap["curve"][1]["gold"] == pytest.approx(expected)
    assert (cap["cap"], cap["verdict"]) == (1, "cap")
    assert (await bench.call("GET", "selection-caps"))["data"] == [cap]


async def test_filters_reach_the_log(bench: Bench) -> None:
    await fill(bench)
    body = {"proxy": "length", "gold": "brevity"}
    for more in ({"route": "elsewhere"}, {"since": 2.0}, {"limit": 8}):
        error = await bench.refused("POST", "selection-caps", 409, json={**body, **more})
        assert error["code"] == "too_little_data"
        assert "20 prompts with 4 samples" in error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"proxy": "length"}, 400),
        ({"proxy": "length", "gold": "length"}, 400),
        ({"proxy": "length", "gold": "nobody"}, 404),
        ({"proxy": "length", "gold": "brevity", "limit": 0}, 400),
        ({"proxy": "length", "gold": "brevity", "surprise": 1}, 400),
        ({"proxy": "length", "gold": "brevity", "route": "nul\x00"}, 400),
    ],
)
async def test_a_bad_request_is_refused(bench: Bench, body: dict[str, Any], status: int) -> None:
    await bench.refused("POST", "selection-caps", status, json=body)


async def test_the_admin_key_is_asked_for(bench: Bench) -> None:
    response = await bench.client.get("/admin/selection-caps", headers={"Authorization": "Bearer wrong"})
    assert response.status_code == 401


async def test_the_command_prints_the_curve_the_law_and_the_verdict(bench: Bench, run: Run, tmp_path: Path) -> None:
    await fill(bench)
    plot = tmp_path / "curve.png"
    text = await run("rewards", "overoptimization", "--proxy", "length", "--gold", "brevity", "--plot", str(plot))
    lines = text.splitlines()
    assert lines[0] == "brevity@2 of the best of n by length@7: 24 prompts, 192 samples of base, 192 rollouts read"
    assert lines[1].split() == ["N", "KL", "GOLD", "95", "%", "GAIN", "ERROR", "LAW"]
    assert [line.split()[0] for line in lines[2:10]] == [str(n) for n in range(1, 9)]
    assert lines[2].split()[2] == "0.5"
    assert lines[10].startswith("gain = d (alpha - beta d), d = sqrt(KL): alpha ")
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Every prompt has the same pool, so there is no doubt; gold falls from the start.
    assert lines[11] == "Cap: best-of-N by length@7 up to N = 1; with more candidates brevity@2 falls."
    assert lines[12] == f"{plot} is drawn"
    listed = json.loads(await run("rewards", "caps", "--json"))
    assert [cap["gold"] for cap in listed] == ["brevity@2"]
    row = (await run("rewards", "caps")).splitlines()[1].split()
    assert row[:3] == ["length@7", "brevity@2", "base"]


async def test_the_command_says_what_was_left_out(bench: Bench, run: Run) -> None:
    await fill(bench)
    await bench.log.append([rollout("other", base_model="other"), rollout("alone", 1000, output_text="xx")])
    text = await run("rewards", "overoptimization", "--proxy", "length", "--gold", "brevity")
    assert text.splitlines()[1:3] == [
        "left out: 1 of another base model",
        "left out: 1 of pools with fewer than 8 samples",
    ]


async def test_the_commands_say_what_is_missing(bench: Bench, run: Run, tmp_path: Path) -> None:
    pair = ("--proxy", "length", "--gold", "brevity")
    assert "too little data" in await run("rewards", "overoptimization", *pair, status=1)
    await fill(bench)
    for name in ("missing/curve.png", "curve.nonsense"):
        assert "cannot be written" in await run(
            "rewards", "overoptimization", *pair, "--plot", str(tmp_path / name), status=1
        )
