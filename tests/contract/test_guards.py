"""The guards of `make check`: what they must find, planted in a repository of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def guard(script: str, repository: Path) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / "deploy" / script)]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert finished.stderr == ""
    return finished.returncode, finished.stdout.splitlines()


def test_files_of_500_lines_and_functions_of_80_pass(repository: Path) -> None:
    function = "def f():\n" + "    x = 1\n" * 79
    (repository / "fits.py").write_text(function + "y = 1\n" * 420)
    assert guard("size_guard.py", repository) == (0, [])


def test_one_line_more_fails(repository: Path) -> None:
    (repository / "file.py").write_text("y = 1\n" * 501)
    (repository / "function.py").write_text("class A:\n    async def f(self):\n" + "        x = 1\n" * 80)
    status, lines = guard("size_guard.py", repository)
    assert status == 1
    assert lines == ["file.py: 501 lines, 500 allowed", "function.py:2: f has 81 lines, 80 allowed"]


PLANTED = {
    "index = 'https://pypi" + ".org/simple'": "package registry",
    "curl download.py" + "torch.org/whl/cpu": "package registry",
    "key = 'sk-" + "a" * 40 + "'": "OpenAI key",
    "token: hf_" + "b" * 34: "Hugging Face token",
    "-----BEGIN RSA PRIVATE" + " KEY-----": "private key",
    "postgresql://user:" + "secret@db.example/x": "password in an address",
}


@pytest.mark.parametrize("line", PLANTED)
def test_a_planted_secret_or_address_is_found(repository: Path, line: str) -> None:
    (repository / "file.txt").write_text(f"first\n{line}\n")
    status, lines = guard("source_scan.py", repository)
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("file.txt:2: ")
    assert PLANTED[line] in lines[0]


@pytest.mark.parametrize(
    "line",
    [
        "postgresql://user:$PASSWORD@db/x",
        "postgresql://user:test@127.0.0.1:5432/x",
        "https://vllm.ai/a:b@c",
        "sqlite+x://user:password@host/name",
    ],
)
def test_what_only_looks_like_a_secret_passes(repository: Path, line: str) -> None:
    (repository / "file.txt").write_text(line)
    assert guard("source_scan.py", repository) == (0, [])


def test_lock_files_are_refused_and_ignored_files_are_not_read(repository: Path) -> None:
    (repository / "uv.lock").write_text("")
    (repository / ".gitignore").write_text("ignored\n")
    (repository / "ignored").write_text(next(iter(PLANTED)))
    status, lines = guard("source_scan.py", repository)
    assert status == 1
    assert [line.split(":")[0] for line in lines] == ["uv.lock"]
