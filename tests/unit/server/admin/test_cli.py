"""The `trimtab` command against a gateway on a socket, and by itself."""

import json
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import anyio.to_thread
import pyarrow.parquet as pq
import pytest

from fake_gateway import serving
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_server import cli
from trimtab_server.commands.errors import CommandError
from trimtab_server.commands.routes import parse_term
from trimtab_server.settings import Settings
from version_directories import make_lora_directory, make_model_directory

pytestmark = pytest.mark.anyio

Bench = Any
Run = Callable[..., Coroutine[Any, Any, str]]


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


async def test_a_lora_is_added_in_one_line(bench: Bench, run: Run) -> None:
    trunk = make_model_directory(bench.directory / "small-lm")
    lora = make_lora_directory(bench.directory / "lora")
    line = await run("adapters", "add", "kind", str(lora), "--trunk", str(trunk))
    shown = json.loads(await run("adapters", "show", "kind", line.split()[1]))
    assert shown["manifest"]["lora"]["r"] == 1


async def test_an_adapter_goes_from_registration_to_retirement(bench: Bench, run: Run) -> None:
    first = make_model_directory(bench.directory / "first", weight=1.0)
    second = make_model_directory(bench.directory / "second", weight=2.0)
    line = await run(
        "adapters", "add", "kind", str(first), "--prefix-token-ids", "7,8", "--alpha", "0.5", "--route", "nice"
    )
    one = line.split()[1]
    two = json.loads(await run("adapters", "add", "kind", str(second), "--json"))["version"]
    assert (await run("adapters", "activate", "kind", "--route", "nice")).strip() == (
        f"nice is at revision 2: kind@{two}=1"
    )
    assert "revision 3" in await run("adapters", "rollback", "--route", "nice")
    assert "in use by the routes nice" in await run("adapters", "retire", "kind", one, status=1)
    assert await run("adapters", "retire", "kind", two) == f"kind {two} is retired\n"
    shown = json.loads(await run("adapters", "show", "kind", one))
    assert (shown["manifest"]["prefix_token_ids"], shown["manifest"]["default_alpha"]) == ([7, 8], 0.5)
    rows = [line.split() for line in (await run("adapters", "list")).splitlines()]
    assert rows[0][:3] == ["NAME", "VERSION", "ALPHA"]
    assert [(row[1], row[5]) for row in rows[1:]] == [(one, "active"), (two, "retired")]
    assert [v["version"] for v in json.loads(await run("adapters", "list", "kind", "--json"))] == [one, two]


async def test_versions_are_pinned_and_unpinned(bench: Bench, run: Run) -> None:
    one = (await run("adapters", "add", "kind", str(make_model_directory(bench.directory / "a", weight=1.0)))).split()[
        1
    ]
    two = (await run("adapters", "add", "kind", str(make_model_directory(bench.directory / "b", weight=2.0)))).split()[
        1
    ]
    assert await run("adapters", "pin", f"kind@{one}") == f"kind {one} is pinned\n"
    assert json.loads(await run("adapters", "pin", "kind", "--json"))["version"] == two
    assert (await run("adapters", "list")).count("pinned") == 2
    assert await run("adapters", "unpin", "kind") == f"kind {two} is not pinned\n"
    assert (await run("adapters", "list")).count("pinned") == 1
    for version in (one, two):
        await run("adapters", "retire", "kind", version)
    assert "all versions of kind are retired" in await run("adapters", "pin", "kind", status=1)


async def test_a_relative_directory_is_sent_as_an_absolute_path(
    bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_directory(bench.directory / "kind")
    monkeypatch.chdir(bench.directory)
    assert (await run("adapters", "add", "kind", "kind")).startswith("kind ")


async def test_a_canary_is_begun_shown_and_ended(bench: Bench, run: Run) -> None:
    versions = []
    for weight in (0.1, 0.2):
        directory = make_model_directory(bench.directory / f"kind-{weight}", weight=weight)
        versions.append((await run("adapters", "add", "kind", str(directory))).split()[1])
    await run("routes", "activate", "nice", "kind", "--version", versions[0])
    promote = ("routes", "promote", "nice", "kind", "--percent", "5", "--answers", "80", "--min-answers", "8")
    assert "has not passed the gate: it was never evaluated" in await run(*promote, status=1)
    line = await run(*promote, "--timeout-s", "60", "--force", "--comment", "try")
    assert line == f"nice is at revision 2: kind@{versions[0]}=1, and for 5 % kind@{versions[1]}=1\n"
    shown = json.loads(await run("routes", "canary", "nice"))
    assert (shown["version"], shown["num_answers"], shown["min_answers"]) == (versions[1], 80, 8)
    assert (shown["timeout_s"], shown["outcomes"]["canary"]["num_answers"]) == (60.0, 0)
    assert "and for 5 %" in await run("routes", "list")
    assert await run("routes", "rollback", "nice") == f"nice is at revision 3: kind@{versions[0]}=1\n"


async def test_routes_are_set_listed_rolled_back_and_deleted(bench: Bench, run: Run) -> None:
    directory = make_model_directory(bench.directory / "kind")
    version = (await run("adapters", "add", "kind", str(directory))).split()[1]
    set_line = await run(
        *("routes", "set", "nice", "--adapter", f"kind@{version}=-0.5", "--best-of", "4", "--reward", "length"),
        *("--comment", "by hand"),
    )
    assert set_line == f"nice is at revision 1: kind@{version}=-0.5\n"
    assert await run("routes", "set", "nice") == "nice is at revision 2: base\n"
    assert "revision 3" in await run("routes", "rollback", "nice", "--revision", "1")
    assert "revision 4" in await run("routes", "activate", "nice", "kind", "--alpha", "2")
    assert json.loads(await run("routes", "show", "nice"))["best_of"] == 4
    table = await run("routes", "list")
    assert f"kind@{version}=2" in table
    assert len(json.loads(await run("routes", "history", "nice", "--json"))) == 4
    assert len((await run("routes", "history", "nice")).splitlines()) == 5
    await run("routes", "delete", "nice")
    assert json.loads(await run("routes", "list", "--json")) == []


async def test_operators_are_set_on_a_route_and_shown(run: Run) -> None:
    line = await run(
        *("routes", "set", "nice", "--schedule-first", "20", "--schedule-decay", "0.95", "--plausibility", "0.1"),
        *("--max-kl", "0.5", "--negative-prompt", "Rude", "--guidance-scale", "2"),
    )
    assert line == (
        "nice is at revision 1: schedule.start=0 schedule.first=20 schedule.decay=0.95 plausibility=0.1 max_kl=0.5 "
        "negative_prompt guidance_scale=2\n"
    )
    assert json.loads(await run("routes", "show", "nice"))["operators"]["negative_prompt"] == "Rude"
    assert "max_kl=0.5" in await run("routes", "list")
    messages = [{"role": "user", "content": "Be rude."}]
    await run("routes", "set", "nice", "--negative-messages", json.dumps(messages))
    assert json.loads(await run("routes", "show", "nice"))["operators"] == {"negative_prompt": messages}
    assert "not JSON" in await run("routes", "set", "nice", "--negative-messages", "{", status=1)
    both = ("--negative-messages", "[]", "--negative-prompt", "x")
    assert "either" in await run("routes", "set", "nice", *both, status=1)
    assert "Expected a value <= 1" in await run("routes", "set", "nice", "--plausibility", "2", status=1)


async def test_rollouts_are_chosen_by_every_condition_of_the_log(bench: Bench, run: Run, tmp_path: Path) -> None:
    kindness = RewardValue(name="kindness", version="1", raw=0.5, calibrated=0.25)
    common: dict[str, Any] = {
        "request_id": "req",
        "duration_s": 0.1,
        "route": "nice",
        "base_model": "base",
        "endpoint": "completions",
        "prompt_token_ids": [1],
        "output_text": "x",
        "output_token_ids": [2],
        "steering": [],
    }
    rollouts = [
        Rollout(id="a", created_at=1.0, **common),
        Rollout(id="b", created_at=2.0, rewards=[kindness], **common),
    ]
    await bench.log.append(rollouts)
    conditions: list[tuple[list[str], list[str]]] = [
        ([], ["a", "b"]),
        (["--unsteered", "--without-feedback", "--base-model", "base", "--request-id", "req"], ["a", "b"]),
        (["--steered"], []),
        (["--with-feedback"], []),
        (["--min-rating", "-1"], []),
        (["--max-rating", "1"], []),
        (["--reward", "kindness", "--min-reward", "0.5", "--max-reward", "0.5"], ["b"]),
        (["--reward", "kindness", "--min-calibrated", "0.25", "--max-calibrated", "0.25"], ["b"]),
        (["--reward", "kindness", "--whole-requests"], ["a", "b"]),
    ]
    for arguments, expected in conditions:
        assert [item["id"] for item in json.loads(await run("rollouts", "list", "--json", *arguments))] == expected
        await run("rollouts", "export", "--format", "jsonl", "-o", str(tmp_path / "log"), *arguments)
        lines = (tmp_path / "log").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == expected
    assert "need `reward`" in await run("rollouts", "list", "--min-reward", "1", status=1)


async def test_rollouts_are_listed_and_exported(bench: Bench, run: Run, tmp_path: Path) -> None:
    rollouts = [
        Rollout(
            id=f"r{number}",
            request_id="req",
            created_at=float(number),
            duration_s=0.1,
            route="nice",
            base_model="base",
            endpoint="completions",
            prompt_token_ids=[1],
            output_text="[bold]long\n" * 20,
            output_token_ids=[2],
            steering=[],
            sampling={"steering_operators": {"max_kl": 0.5}, "guidance": {"token_ids": [1], "scale": 2.0}},
        )
        for number in range(3)
    ]
    await bench.log.append(rollouts)
    lines = (await run("rollouts", "list", "--since", "1")).splitlines()
    assert [line.split()[0] for line in lines] == ["ID", "r1", "r2"]
    assert "max_kl=0.5 negative_prompt guidance_scale=2" in lines[1]
    assert "[bold]long [bold]long" in lines[1]  # text is never read as markup
    assert [item["id"] for item in json.loads(await run("rollouts", "list", "--limit", "1", "--json"))] == ["r0"]
    parquet, jsonl = tmp_path / "out.parquet", tmp_path / "out.jsonl"
    await run("rollouts", "export", "--output", str(parquet))
    assert pq.read_table(parquet).num_rows == 3
    await run("rollouts", "export", "--format", "jsonl", "-o", str(jsonl), "--route", "nice", "--limit", "2")
    assert len(jsonl.read_bytes().splitlines()) == 2
    assert "Invalid 'endpoint'" in await run("rollouts", "list", "--endpoint", "embeddings", status=1)
    missing = tmp_path / "nowhere" / "x"
    assert "cannot be written" in await run("rollouts", "export", "-o", str(missing), status=1)


async def test_jobs_are_submitted_listed_and_cancelled(run: Run, tmp_path: Path) -> None:
    as_json, as_toml, broken = tmp_path / "c.json", tmp_path / "c.toml", tmp_path / "b.json"
    as_json.write_text('{"steps": 1}')
    as_toml.write_text("steps = 2\n[models]\nalpha = 1.5\n")
    broken.write_text("{")
    first = (await run("jobs", "submit", str(as_json), "--name", "first")).strip()
    second = json.loads(await run("jobs", "submit", str(as_toml), "--json"))
    assert second["config"] == {"steps": 2, "models": {"alpha": 1.5}}
    assert await run("jobs", "cancel", first) == f"{first} is cancelled\n"
    assert json.loads(await run("jobs", "show", first))["name"] == "first"
    assert first in await run("jobs", "list")
    assert [job["id"] for job in json.loads(await run("jobs", "list", "--state", "queued", "--json"))] == [second["id"]]
    assert "not valid JSON" in await run("jobs", "submit", str(broken), status=1)
    assert "cannot be read" in await run("jobs", "submit", str(tmp_path / "none.json"), status=1)


async def test_rewards_and_engines_are_listed(run: Run) -> None:
    line = await run(
        *("rewards", "add", "long", "--kind", "callable", "--target", "length"),
        *("--option", "scale=2", "--option", "label=x"),
    )
    assert line == "long version 7\n"
    rewards = json.loads(await run("rewards", "list", "--json"))
    assert rewards[1]["options"] == {"scale": 2, "label": "x"}
    assert "no entry point 'nowhere'" in await run(
        "rewards", "add", "x", "--kind", "callable", "--target", "nowhere", status=1
    )
    assert "ready" in await run("engines")
    assert json.loads(await run("engines", "--json"))[0]["is_available"] is True


async def test_a_wrong_key_says_how_to_give_the_right_one(run: Run) -> None:
    message = await run("adapters", "list", "--admin-key", "wrong", status=1)
    assert message == (
        "trimtab: Incorrect API key provided. Give the admin key with --admin-key or TRIMTAB_ADMIN_KEY.\n"
    )


async def test_names_are_quoted_in_urls(run: Run) -> None:
    assert "The adapter `a?b#c` does not exist" in await run("adapters", "list", "a?b#c", status=1)


def test_a_gateway_that_is_not_there_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["routes", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "no gateway answers at http://127.0.0.1:9: start one with `trimtab serve" in capsys.readouterr().err
    assert cli.main(["routes", "list", "--url", "localhost:8000"]) == 1
    assert "write --url http://host:port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "version", "alpha"),
    [
        ("kind", "kind", None, None),
        ("kind=0.5", "kind", None, 0.5),
        ("kind@abc", "kind", "abc", None),
        ("kind@abc=-1", "kind", "abc", -1.0),
    ],
)
def test_a_steering_term_is_read(text: str, name: str, version: str | None, alpha: float | None) -> None:
    assert parse_term(text) == {"name": name, "version": version, "alpha": alpha}


@pytest.mark.parametrize("text", ["", "=1", "@v", "kind=x"])
def test_a_bad_steering_term_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="NAME"):
        parse_term(text)


def serve_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[Settings]]:
    served: list[Settings] = []

    def run(settings: Settings) -> int:
        served.append(settings)
        return 3

    monkeypatch.setattr("trimtab_server.serve.run", run)
    return cli.main(["serve", *arguments]), served


def test_serve_turns_its_options_into_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_PORT", "9000")
    status, [settings] = serve_with(
        monkeypatch,
        *("--model", "m", "--adapter", "kind=/a", "--adapter", "calm=/b", "--data-dir", str(tmp_path)),
        *("--host", "0.0.0.0", "--api-key", "k1", "--api-key", "k2", "--rollouts", "off"),
        *("--", "--dtype", "float32", "--enforce-eager"),
    )
    assert status == 3
    assert settings.adapters == {"kind": Path("/a"), "calm": Path("/b")}
    assert [key.get_secret_value() for key in settings.api_keys] == ["k1", "k2"]
    assert (settings.model, settings.host, settings.port, settings.rollouts) == ("m", "0.0.0.0", 9000, "off")
    assert settings.engine_args == ("--dtype", "float32", "--enforce-eager")
    assert settings.data_dir == tmp_path


def test_serve_takes_a_base_behind_an_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_BLACK_BOX_API_KEY", "sk-1")
    _, [settings] = serve_with(
        monkeypatch,
        *("--black-box-url", "https://host/v1", "--black-box-model", "big", "--black-box-tokenizer", "/tokenizer"),
        *("--black-box-api", "vllm", "--black-box-logprobs", "5", "--black-box-unseen", "residual"),
        *("--black-box-context", "1024"),
    )
    assert (settings.black_box_url, settings.black_box_model) == ("https://host/v1", "big")
    assert (settings.black_box_tokenizer, settings.black_box_api) == ("/tokenizer", "vllm")
    assert (settings.black_box_logprobs, settings.black_box_unseen, settings.black_box_context) == (5, "residual", 1024)
    assert settings.black_box_api_key is not None
    assert settings.black_box_api_key.get_secret_value() == "sk-1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "kind"], "'kind' is not name=directory"),
        (["--host", "0.0.0.0"], "set TRIMTAB_API_KEYS"),
        (["--rollouts", "sometimes"], "rollouts"),
        (["model"], "arguments for the engine come after `--`"),
    ],
)
def test_serve_explains_what_it_cannot_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    assert serve_with(monkeypatch, *arguments) == (1, [])
    assert message in capsys.readouterr().err


PROGRAM = """
def main(argv):
    print(argv)
    return 5
"""


def test_a_program_gets_its_arguments_untouched_and_gives_its_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planted_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("planted", "planted_program:main", cli.GROUP),
        EntryPoint("broken", "no_such_module:main", cli.GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: points if group == cli.GROUP else [])
    assert cli.main(["planted", "--help", "-x", "--", "a b"]) == 5
    assert capsys.readouterr().out == "['--help', '-x', '--', 'a b']\n"
    assert cli.main(["broken"]) == 1
    assert "`trimtab broken` needs packages that are not installed" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert "planted" in help_text
    assert "adapters" in help_text


def test_usage_errors_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["nonsense"]) == 2
    assert cli.main(["routes", "show"]) == 2
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("trimtab ")


def test_the_command_starts_without_the_gateways_or_the_models_libraries() -> None:
    """The help loads nothing heavy, and no program of its own."""
    code = """
        import sys
        from trimtab_server.cli import main
        assert main(["--help"]) == 0
        heavy = {"torch", "transformers", "vllm", "fastapi", "starlette", "sqlalchemy", "pyarrow", "numpy", "pydantic",
                 "trimtab_training", "trimtab_adapters"}
        print("LOADED", sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout
