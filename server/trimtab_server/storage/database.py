"""The database: SQLite or PostgreSQL behind one set of calls."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from anyio import CapacityLimiter
from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    SQLAlchemyError,
    StatementError,
)

from trimtab_adapters.contract.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Insert = sqlite.Insert | postgresql.Insert

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x7472696D746162  # "trimtab": PostgreSQL's advisory locks are numbers
_BUSY_TIMEOUT_S = 30.0
_MAX_THREADS = 8
_CONTENT_SQLSTATES = ("22", "23", "54")
"""PostgreSQL's classes for bad data, broken constraints and values too large for an index."""


class RefusedDataError(StorageError):
    """The database works but does not take these values; asking again is of no use."""


class Database:
    """Connections to one database. Calls block; on the event loop use `read` and `write`, which use worker threads.

    SQLite runs in WAL mode with `synchronous=FULL`: a committed transaction survives a power cut. Writing transactions
    take the write lock at their start, because one that takes it later fails at once when another came in between.

    Args:
        url: `sqlite:////path/to/file` or `postgresql+psycopg://user:password@host/name`.

    Raises:
        StorageError: The URL is not understood.
    """

    def __init__(self, url: str) -> None:
        self._engine = _build_engine(url)
        self._limiter = CapacityLimiter(_MAX_THREADS)

    @property
    def engine(self) -> Engine:
        """SQLAlchemy's own handle."""
        return self._engine

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite; otherwise it is PostgreSQL."""
        return self._engine.dialect.name == "sqlite"

    def migrate(self) -> None:
        """Bring the schema up to date. Several processes may do so at once.

        Raises:
            StorageError: The database cannot be reached, or a newer Trimtab has changed it.
        """
        if self.is_sqlite and (file := self._engine.url.database):
            try:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise StorageError(f"the database's directory {Path(file).parent} cannot be made: {exc}") from exc
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self.writing() as connection:
            self.lock(connection, _MIGRATION_LOCK)
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as exc:
                raise StorageError(
                    f"the database's schema is not one that this version knows ({exc}); it was made by a newer one"
                ) from exc

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises `StorageError`."""
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes; committed at the end, rolled back on an error. Raises `StorageError`."""
        with (
            _translated(),
            self._engine.connect().execution_options(trimtab_writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a reading transaction on a worker thread."""

        def call() -> T:
            with self.reading() as connection:
                return work(connection)

        return await anyio.to_thread.run_sync(call, limiter=self._limiter)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a writing transaction on a worker thread. A cancelled caller does not interrupt it."""

        def call() -> T:
            with self.writing() as connection:
                return work(connection)

        return await anyio.to_thread.run_sync(call, limiter=self._limiter)

    def lock(self, connection: Connection, key: int) -> None:
        """Let no other writing transaction with this key go on until this one ends; SQLite has one writer anyway."""
        if not self.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})

    def insert(self, table: Table) -> Insert:
        """An INSERT that knows this database's ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _build_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise StorageError("the database must be a file: sqlite:////path/to/file")
            engine = create_engine(parsed, hide_parameters=True, connect_args={"timeout": _BUSY_TIMEOUT_S})
            event.listen(engine, "connect", _configure_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        if parsed.get_backend_name() == "postgresql":
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            return create_engine(parsed, hide_parameters=True, pool_pre_ping=True, pool_size=_MAX_THREADS)
    except (ArgumentError, NoSuchModuleError) as exc:
        # The URL may hold a password, so it is not repeated.
        raise StorageError("the database URL is not understood; use sqlite:////path or postgresql+psycopg://") from exc
    except ImportError as exc:
        raise StorageError(f"the database's driver is not installed ({exc}); install trimtab[postgres]") from exc
    raise StorageError(f"{parsed.get_backend_name()} is not supported; use SQLite or PostgreSQL")


def _configure_sqlite(dbapi_connection: Any, _: object) -> None:
    dbapi_connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = dbapi_connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("trimtab_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    """The boundary where the database's exceptions become ours. Statements may hold prompts, so they are left out."""
    try:
        yield
    except DBAPIError as exc:
        sqlstate = getattr(exc.orig, "sqlstate", None) or ""
        is_content = isinstance(exc, DataError | IntegrityError) or sqlstate.startswith(_CONTENT_SQLSTATES)
        error = RefusedDataError if is_content else StorageError
        raise error(f"the database refused: {exc.orig}") from exc
    except StatementError as exc:  # a value that could not be turned into the column's type
        raise RefusedDataError(f"the database cannot hold a value: {exc.orig}") from exc
    except SQLAlchemyError as exc:
        raise StorageError(f"the database failed: {type(exc).__name__}") from exc
