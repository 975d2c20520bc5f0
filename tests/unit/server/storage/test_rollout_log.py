"""The rollout log: what `append` promises, and what survives a kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from typing_extensions import override

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.database import Database
from trimtab_server.storage.rollout_log import REJECTED_FILE, RolloutMode, SpooledRolloutLog
from trimtab_server.storage.rollouts import SqlRolloutReader
from trimtab_server.storage.spool import Spool

pytestmark = pytest.mark.anyio

MakeRollout = Callable[..., Rollout]


async def stored_ids(database: Database) -> list[str]:
    return [rollout.id async for rollout in SqlRolloutReader(database).read(RolloutFilter())]


class FlakyDatabase(Database):
    """Refuses to write while `is_away`."""

    is_away = False

    @override
    @contextmanager
    def writing(self) -> Iterator[Connection]:
        if self.is_away:
            raise StorageError("the database is away")
        with super().writing() as connection:
            yield connection


@pytest.fixture
def flaky(sqlite_database: Database) -> FlakyDatabase:
    return FlakyDatabase(str(sqlite_database.engine.url))


@pytest.mark.parametrize("mode", ["durable", "async"])
async def test_flush_brings_everything_that_was_acknowledged(
    database: Database, tmp_path: Path, make_rollout: MakeRollout, mode: RolloutMode
) -> None:
    log = SpooledRolloutLog(database, tmp_path / "spool", mode, linger_s=60.0)
    await log.start()
    for number in range(5):
        await log.append([make_rollout(f"{number}-a"), make_rollout(f"{number}-b")])
    await log.flush()
    assert len(await stored_ids(database)) == 10
    assert (log.appended, log.drained, log.pending) == (10, 10, 0)
    await log.aclose()


async def test_the_drainer_works_without_being_asked(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", linger_s=0.0)
    drained = asyncio.Event()
    drain = log._drain

    async def watched(until: Any) -> None:
        await drain(until)
        drained.set()

    monkeypatch.setattr(log, "_drain", watched)
    await log.start()
    await log.append([make_rollout("a")])
    await drained.wait()
    assert await stored_ids(sqlite_database) == ["a"]
    await log.aclose()


async def test_closing_drains_and_leaves_an_empty_spool(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", "async", linger_s=60.0)
    await log.start()
    await log.append([make_rollout("a")])
    await log.aclose()
    assert await stored_ids(sqlite_database) == ["a"]
    assert list((tmp_path / "spool").glob("*.seg")) == []
    with pytest.raises(StorageError, match="not running"):
        await log.append([make_rollout("b")])


async def test_mode_off_logs_nothing_but_drains_what_an_earlier_run_left(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    spool = Spool(tmp_path / "spool")
    spool.open()
    spool.append([json.dumps(make_rollout("left").model_dump()).encode()], sync=True)
    spool.close()
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", "off")
    await log.start()
    assert (log.recovered, log.pending) == (1, 1)
    await log.append([make_rollout("a")])
    await log.flush()
    assert await stored_ids(sqlite_database) == ["left"]
    assert (log.appended, log.pending) == (0, 0)
    await log.aclose()


async def test_callers_at_the_same_time_share_a_flush_and_are_told_after_it(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", linger_s=60.0)
    await log.start()
    entered, gate, groups = asyncio.Event(), threading.Event(), []
    loop, append = asyncio.get_running_loop(), log._spool.append

    def slow(payloads: Sequence[bytes], *, sync: bool) -> None:
        groups.append((len(payloads), sync))
        loop.call_soon_threadsafe(entered.set)
        gate.wait(timeout=30)
        append(payloads, sync=sync)

    monkeypatch.setattr(log._spool, "append", slow)
    first = asyncio.create_task(log.append([make_rollout("first")]))
    await entered.wait()
    others = [asyncio.create_task(log.append([make_rollout(f"{number}")])) for number in range(9)]
    await asyncio.sleep(0)
    assert not first.done()
    gate.set()
    await asyncio.gather(first, *others)
    assert groups == [(1, True), (9, True)]
    await log.aclose()


async def test_durable_tells_the_caller_of_a_failing_disk_and_works_again_later(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool")
    await log.start()

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left on device"):
            await log.append([make_rollout("refused")])
    await log.append([make_rollout("a")])
    await log.flush()
    assert await stored_ids(sqlite_database) == ["a"]
    await log.aclose()


async def test_async_counts_what_a_failing_disk_lost(
    sqlite_database: Database,
    tmp_path: Path,
    make_rollout: MakeRollout,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", "async")
    await log.start()

    def full(payloads: Sequence[bytes], *, sync: bool) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(log._spool, "append", full)
    await log.append([make_rollout("a"), make_rollout("b")])
    await log.flush()
    assert (log.lost, log.pending) == (2, 0)
    assert "2 rollouts are lost: disk full" in caplog.text
    await log.aclose()


async def test_async_makes_callers_wait_when_too_much_waits(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab_server.storage.rollout_log._MAX_WAITING_BYTES", 10)
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", "async")
    await log.start()
    gate, append = threading.Event(), log._spool.append

    def slow(payloads: Sequence[bytes], *, sync: bool) -> None:
        gate.wait(timeout=30)
        append(payloads, sync=sync)

    monkeypatch.setattr(log._spool, "append", slow)
    await log.append([make_rollout("a")])
    second = asyncio.create_task(log.append([make_rollout("b")]))
    await asyncio.sleep(0)
    assert not second.done()
    gate.set()
    await second
    await log.aclose()
    assert await stored_ids(sqlite_database) == ["a", "b"]


async def test_records_wait_in_the_spool_while_the_database_is_away(
    flaky: FlakyDatabase, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    log = SpooledRolloutLog(flaky, tmp_path / "spool", linger_s=60.0)
    await log.start()
    flaky.is_away = True
    await log.append([make_rollout("a")])
    with pytest.raises(StorageError, match="away"):
        await log.flush()
    assert log.pending == 1
    await log.aclose()
    flaky.is_away = False
    again = SpooledRolloutLog(flaky, tmp_path / "spool")
    await again.start()
    await again.flush()
    assert (again.recovered, await stored_ids(flaky)) == (1, ["a"])
    await again.aclose()
    flaky.close()


async def test_a_record_that_the_database_cannot_hold_is_put_aside_and_holds_up_nothing(
    database: Database, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    log = SpooledRolloutLog(database, tmp_path / "spool", linger_s=60.0)
    await log.start()
    bad = make_rollout("bad", prompt_token_ids=[2**40])  # wider than the column's 32 bits
    await log.append([make_rollout("1"), bad, make_rollout("2"), make_rollout("3")])
    await log.flush()
    assert await stored_ids(database) == ["1", "2", "3"]
    assert (log.drained, log.rejected, log.pending) == (3, 1, 0)
    [line] = (tmp_path / "spool" / REJECTED_FILE).read_text().splitlines()
    assert Rollout.model_validate_json(line) == bad
    await log.aclose()


async def test_a_value_that_json_cannot_carry_is_refused(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool")
    await log.start()
    with pytest.raises(StorageError, match="JSON cannot carry"):
        await log.append([make_rollout("a", metadata={"x": object()})])
    await log.aclose()


async def test_a_caller_that_goes_away_does_not_stop_its_record(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    log = SpooledRolloutLog(sqlite_database, tmp_path / "spool", linger_s=60.0)
    await log.start()
    task = asyncio.create_task(log.append([make_rollout("a")]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await log.append([make_rollout("b")])
    await log.flush()
    assert await stored_ids(sqlite_database) == ["a", "b"]
    await log.aclose()


async def test_append_without_start_is_an_error(
    sqlite_database: Database, tmp_path: Path, make_rollout: MakeRollout
) -> None:
    with pytest.raises(StorageError, match="not running"):
        await SpooledRolloutLog(sqlite_database, tmp_path / "spool").append([make_rollout("a")])


WRITER = """
    import asyncio, sys
    from pathlib import Path
    from trimtab_adapters.contract.records import Rollout
    from trimtab_server.storage.database import Database
    from trimtab_server.storage.rollout_log import SpooledRolloutLog

    async def client(log, name):
        number = 0
        while True:
            rollout = Rollout(
                id=f"{name}-{number}", request_id="r", created_at=1.0, duration_s=0.0, route="kind", base_model="base",
                endpoint="completions", prompt_token_ids=[1], output_text="x" * 500, output_token_ids=[2], steering=[],
            )
            await log.append([rollout])
            sys.stdout.write(rollout.id + "\\n")
            sys.stdout.flush()
            number += 1

    async def run(url, spool, life):
        database = Database(url)
        log = SpooledRolloutLog(database, Path(spool), segment_bytes=20_000, linger_s=0.0)
        await log.start()
        await asyncio.gather(*(client(log, f"life{life}-client{index}") for index in range(4)))

    asyncio.run(run(*sys.argv[1:]))
"""


async def test_kill_9_loses_no_acknowledged_rollout_and_doubles_none(sqlite_database: Database, tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    for life in range(3):  # each begins with what the one before left
        arguments = [str(sqlite_database.engine.url), str(tmp_path / "s"), str(life)]
        command = [sys.executable, "-c", textwrap.dedent(WRITER), *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline().strip() for _ in range(100)]
            writer.send_signal(signal.SIGKILL)
            # The last line may have been cut by the kill.
            lines += [line.strip() for line in writer.stdout.readlines() if line.endswith("\n")]
        acknowledged.update(lines)
    log = SpooledRolloutLog(sqlite_database, tmp_path / "s")
    await log.start()
    await log.flush()
    await log.aclose()
    found = await stored_ids(sqlite_database)
    assert len(found) == len(set(found))
    assert acknowledged <= set(found)
