"""Databases for the storage tests: SQLite always, PostgreSQL where its server is installed."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_server.storage.database import Database


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A private PostgreSQL cluster on a free port; skips where there is no server."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not programs:
        pytest.skip("no PostgreSQL server is installed (/usr/lib/postgresql/*/bin)")
    directory = Path(tempfile.mkdtemp(prefix="trimtab-postgres-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = _unprivileged_user()
        os.chown(directory, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]

    def run(program: str, *arguments: str) -> None:
        command = [*as_user, str(programs[-1] / program), *arguments]
        done = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = str(directory / "data")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories= -c fsync=off"
    try:
        run("initdb", "-D", data, "-U", "trimtab", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        run("pg_ctl", "-D", data, "-l", str(directory / "log"), "-o", options, "-w", "start")
        yield f"postgresql+psycopg://trimtab@127.0.0.1:{port}"
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _unprivileged_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'data' / 'trimtab.db'}"
        return
    server = request.getfixturevalue("postgres_url")
    name = f"t{uuid.uuid4().hex}"
    admin = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield f"{server}/{name}"
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database of each kind."""
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite database, where the kind does not matter."""
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    yield database
    database.close()


MakeRollout = Callable[..., Rollout]


@pytest.fixture
def make_rollout() -> MakeRollout:
    """Builds a rollout with every field set, changed by keyword."""

    def make(rollout_id: str = "r1", created_at: float = 1.0, **changes: Any) -> Rollout:
        fields: dict[str, Any] = {
            "id": rollout_id,
            "request_id": "req-1",
            "created_at": created_at,
            "duration_s": 0.25,
            "route": "kind",
            "base_model": "base",
            "endpoint": "completions",
            "prompt": "Say",
            "prompt_token_ids": [5, 6],
            "output_text": "good",
            "output_token_ids": [1, 2],
            "steering": [AdapterWeight(name="kind", version="a" * 16, alpha=1.0)],
            "base_logprobs": [-0.1, -2.5],
            "adapter_logprobs": [[-0.3, -0.4]],
            "steered_logprobs": [-0.05, -1.5],
            "kl": [0.01, 0.02],
            "flipped": [False, True],
            "sampling": {"temperature": 1.0, "stop": ["\n"]},
            "candidate_index": 1,
            "num_candidates": 4,
            "chosen": True,
            "finish_reason": "stop",
            "rewards": [RewardValue(name="kindness", version="1", raw=0.5, calibrated=0.75, calibration_size=16)],
            "metadata": {"prompt_index": 0},
        }
        return Rollout.model_validate({**fields, **changes})

    return make
