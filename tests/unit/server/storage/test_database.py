"""The database: its schema, its transactions and its errors."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import select, text

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.params import SteeringOptions
from trimtab_server.storage import database as database_module
from trimtab_server.storage.catalog_state import revision_of
from trimtab_server.storage.database import Database, RefusedDataError
from trimtab_server.storage.tables import metadata, rewards, route_revisions


def test_migrations_build_exactly_the_tables(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(rewards.insert().values(name="a", kind="callable", target="t", options={}, updated_at=1.0))
    database.migrate()
    with database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM rewards")).scalar_one() == 1


def test_routes_of_the_first_schema_are_kept(database_url: str) -> None:
    database = Database(database_url)
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).parent / "migrations"))
    if database.is_sqlite and (file := database.engine.url.database):
        Path(file).parent.mkdir(parents=True)
    with database.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "INSERT INTO route_revisions (route, revision, steering, created_at, comment) "
                "VALUES ('nice', 1, '[]', 1.0, '')"
            )
        )
    database.migrate()
    with database.reading() as connection:
        row = connection.execute(select(route_revisions)).mappings().one()
    assert (row["route"], revision_of(row).options) == ("nice", SteeringOptions())
    database.close()


def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    with ThreadPoolExecutor(len(databases)) as pool:
        for migration in [pool.submit(database.migrate) for database in databases]:
            migration.result()
    for database in databases:
        database.close()


def test_a_database_of_a_newer_version_is_refused(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="made by a newer one"):
        database.migrate()


def test_sqlite_is_set_up_to_survive_a_power_cut(sqlite_database: Database) -> None:
    with sqlite_database.reading() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_failed_write_leaves_nothing(database: Database) -> None:
    row = {"name": "a", "kind": "callable", "target": "t", "options": {}, "updated_at": 1.0}

    def write_twice() -> None:
        with database.writing() as connection:
            connection.execute(rewards.insert().values(row))
            connection.execute(rewards.insert().values(row))

    with pytest.raises(RefusedDataError):
        write_twice()
    with database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM rewards")).scalar_one() == 0


def test_an_error_tells_neither_statement_nor_values(database: Database) -> None:
    row = {"name": "a", "kind": "callable", "target": None, "options": {"secret": "hunter2"}, "updated_at": 1.0}
    with pytest.raises(StorageError) as caught, database.writing() as connection:
        connection.execute(rewards.insert().values(row))
    if database.is_sqlite:  # PostgreSQL itself shows the failing row
        assert "hunter2" not in caught.value.message
    assert "INSERT" not in caught.value.message


def test_a_reader_sees_a_steady_state_while_another_writes(sqlite_database: Database) -> None:
    count = text("SELECT count(*) FROM rewards")
    with sqlite_database.reading() as reader:
        assert reader.execute(count).scalar_one() == 0
        with sqlite_database.writing() as writer:
            values = {"name": "a", "kind": "callable", "target": "t", "options": {}, "updated_at": 1.0}
            writer.execute(rewards.insert().values(values))
        assert reader.execute(count).scalar_one() == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("mysql://user:hunter2@host/db", "not supported"),
        ("nonsense hunter2", "not understood"),
    ],
)
def test_a_bad_url_is_refused_without_being_repeated(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        Database(url)
    assert "hunter2" not in caught.value.message


def test_a_directory_that_cannot_be_made_and_a_server_that_is_away_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        Database(f"sqlite:///{tmp_path}/file/x.db").migrate()
    away = Database("postgresql://trimtab:hunter2@127.0.0.1:9/x")
    with pytest.raises(StorageError, match="refused") as caught:
        away.migrate()
    assert not isinstance(caught.value, RefusedDataError)
    assert "hunter2" not in caught.value.message


@pytest.mark.anyio
async def test_work_runs_in_a_thread_and_its_own_errors_pass_through(sqlite_database: Database) -> None:
    here = threading.get_ident()
    there = await sqlite_database.read(lambda connection: threading.get_ident())
    assert there != here

    def fail(connection: object) -> None:
        raise KeyError("mine")

    calls: list[Callable[..., object]] = [sqlite_database.read, sqlite_database.write]
    for call in calls:
        with pytest.raises(KeyError, match="mine"):
            await call(fail)  # type: ignore[misc]
