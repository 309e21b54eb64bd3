"""The SQLite database of a patch registry: its edits, and the events that record what was done with them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from remend.errors import FileError, RemendError
from remend.staging import disk_failure

DATABASE = "book.sqlite"
VERSION = 1
DRAFT, ACTIVE, REVERTED = "draft", "active", "reverted"
STATES = (DRAFT, ACTIVE, REVERTED)
EVENT_ADDED, EVENT_ACTIVATED, EVENT_REVERTED = "added", "activated", "reverted"
LOCK_TIMEOUT = 60.0
"""Seconds that a process waits for another one that writes."""

SCHEMA = MetaData()
REGISTRY_TABLE = Table(
    "book", SCHEMA,
    Column("version", Integer, nullable=False),
    Column("model", String, nullable=False),
    Column("config", String, nullable=False),
    Column("created", String, nullable=False),
)  # fmt: skip
EDITS_TABLE = Table(
    "edits", SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("file", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("added", String, nullable=False),
    Column("who", String, nullable=False),
    Column("why", String, nullable=False),
    Column("requests", JSON, nullable=False),
)  # fmt: skip
EVENTS_TABLE = Table(
    "events", SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("edit", Integer, ForeignKey("edits.id"), nullable=False),
    Column("what", String, nullable=False),
    Column("at", String, nullable=False),
    Column("who", String, nullable=False),
    Column("why", String, nullable=False),
    Column("measured", JSON),
)  # fmt: skip


@dataclass(frozen=True)
class PatchEntry:
    """The record of one edit.

    Attributes:
        id: the edit's number in the registry.
        file: the SHA-256 of the edit's manifest, which is also the name of its folder.
        state: ``draft``, ``active`` or ``reverted``.
        added: when it was added (ISO 8601, UTC).
        who, why: who added it, and why.
        requests: the edit's requests, as in its manifest.
    """

    id: int
    file: str
    state: str
    added: str
    who: str
    why: str
    requests: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class PatchEvent:
    """Something that was done with an edit.

    Attributes:
        id: the event's number, which is the registry's revision after it.
        edit: the number of the edit.
        what: ``added``, ``activated`` or ``reverted``.
        at: when it happened (ISO 8601, UTC).
        who, why: who did it, and why.
        measured: what was measured before an activation: the acceptance result and the conflicts.
    """

    id: int
    edit: int
    what: str
    at: str
    who: str
    why: str
    measured: Mapping[str, Any] | None


class Database:
    """The database of a patch registry, for several processes at once.

    A reader sees one consistent state. A write is one transaction, in full or not at all: it keeps other writers out,
    and if its process is killed the previous state remains.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / DATABASE
        self.engine: Engine = create_engine(f"sqlite:///{self.file}", connect_args={"timeout": LOCK_TIMEOUT})
        event.listen(self.engine, "connect", _configure_connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a read transaction: everything read within it is of one state of the database."""
        with self._transaction("BEGIN") as connection:
            _check_schema(connection, self.file)
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a write transaction: no other process writes within it; an exception rolls it back."""
        # IMMEDIATE takes the write lock now; a deferred transaction fails at once if another process wrote since.
        with self._transaction("BEGIN IMMEDIATE") as connection:
            _check_schema(connection, self.file)
            yield connection

    def create(self, model: str, config: str, now: str) -> None:
        """Create the tables of an empty database."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            SCHEMA.create_all(connection)
            connection.execute(insert(REGISTRY_TABLE).values(version=VERSION, model=model, config=config, created=now))
        self.engine.dispose()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with _readable_errors(self.file), self.engine.connect() as connection:
            connection.exec_driver_sql(begin)
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                # On a full disk, SQLite may have rolled it back itself.
                if getattr(connection.connection.dbapi_connection, "in_transaction", False):
                    connection.exec_driver_sql("ROLLBACK")
                raise

    def info(self) -> Mapping[str, Any]:
        """Return the version of the database, and the model that the registry is for.

        Raises:
            FileError: the database is damaged, or of an unknown version.
        """
        with self.reading() as connection:
            rows = connection.execute(select(REGISTRY_TABLE)).mappings().all()
        if len(rows) != 1 or not all(isinstance(rows[0][key], str) for key in ("model", "config", "created")):
            raise FileError(f"{self.file} does not say which model it is for; it was altered")
        if rows[0]["version"] != VERSION:
            raise FileError(f"{self.file} is of version {rows[0]['version']!r}; this release reads {VERSION}")
        return dict(rows[0])

    def entries(self, connection: Connection) -> list[PatchEntry]:
        """Return all edits in the order in which they were added."""
        rows = connection.execute(select(EDITS_TABLE).order_by(EDITS_TABLE.c.id)).mappings()
        return [_parse_entry(dict(row), self.file) for row in rows]

    def events(self, connection: Connection) -> list[PatchEvent]:
        """Return all events in order."""
        rows = connection.execute(select(EVENTS_TABLE).order_by(EVENTS_TABLE.c.id)).mappings()
        return [_parse_event(dict(row), self.file) for row in rows]

    @staticmethod
    def add_edit(connection: Connection, **values: Any) -> int:
        """Record an edit as a draft, and return its number."""
        key = connection.execute(insert(EDITS_TABLE).values(state=DRAFT, **values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    @staticmethod
    def add_event(connection: Connection, state: str | None, **values: Any) -> None:
        """Record an event, and the new state of its edit if there is one."""
        connection.execute(insert(EVENTS_TABLE).values(**values))
        if state is not None:
            connection.execute(update(EDITS_TABLE).where(EDITS_TABLE.c.id == values["edit"]).values(state=state))

    def is_intact(self) -> bool:
        """Return whether the file passes SQLite's integrity check."""
        with self.reading() as connection:
            return [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")] == ["ok"]


def active_after(events: list[PatchEvent], revision: int | None = None) -> list[int]:
    """Return the numbers of the edits that are active after an event (by default the last), in activation order."""
    active: dict[int, None] = {}  # as an ordered set
    for past_event in events:
        if revision is not None and past_event.id > revision:
            break
        if past_event.what == EVENT_ACTIVATED:
            active.setdefault(past_event.edit)
        elif past_event.what == EVENT_REVERTED:
            active.pop(past_event.edit, None)
    return list(active)


def _configure_connection(connection: Any, _: Any) -> None:
    """Set up a new SQLite connection."""
    # Python's sqlite3 would begin transactions by itself, and later than reading() and writing() do.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # what was committed survives a loss of power


def _check_schema(connection: Connection, file: Path) -> None:
    """Raise unless the database has the tables of a patch registry, as they are created, and nothing else.

    Raises:
        FileError: a table is missing or another one, or there are triggers, views, or further tables or indexes. A
            trigger would change records by itself.
    """
    expected = _expected_tables()
    found = connection.exec_driver_sql("SELECT type, name, tbl_name, sql FROM sqlite_master").all()
    for kind, name, table, sql in found:
        # SQLite makes the index of a unique column itself, and stores no text for it.
        automatic = kind == "index" and sql is None and table in expected
        if not automatic and (kind != "table" or expected.get(name) != _one_line(sql)):
            raise FileError(
                f"{file} was altered: its {kind} {name!r} is none of a patch registry, which has the tables "
                f"{', '.join(expected)} and nothing else; restore it from a copy"
            )
    if missing := expected.keys() - {name for _, name, _, _ in found}:
        raise FileError(
            f"{file} is damaged or was altered: it has no table {', '.join(sorted(missing))}; restore it from a copy"
        )


@cache
def _expected_tables() -> Mapping[str, str]:
    """Return the statements that create the tables of a registry, by name."""
    return {table.name: _one_line(CreateTable(table).compile(dialect=dialect())) for table in SCHEMA.sorted_tables}


def _one_line(sql: object) -> str:
    return " ".join(str(sql).split())


_DISK_ERRORS = {
    sqlite3.SQLITE_FULL: "the disk is full, or a quota is used up: free some space",
    sqlite3.SQLITE_IOERR: "the disk reports an error: check it, and that it has room",
    sqlite3.SQLITE_READONLY: "it is read-only: check that you may write the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that it exists, that you may write its folder, and that the "
    "disk has room",
    sqlite3.SQLITE_PERM: "it is not allowed: check that you may write the file and its folder",
    sqlite3.SQLITE_BUSY: f"another process writes it, and did not finish within {LOCK_TIMEOUT:.0f} s: try again",
    sqlite3.SQLITE_LOCKED: f"another process writes it, and did not finish within {LOCK_TIMEOUT:.0f} s: try again",
    sqlite3.SQLITE_NOMEM: "there is not enough memory",
}
"""SQLite's errors that say nothing about the content of the database, and what to do."""


@contextmanager
def _readable_errors(file: Path) -> Iterator[None]:
    """Turn the database's errors into a FileError that says what is wrong."""
    try:
        yield
    except DBAPIError as error:
        # The lower byte is the kind of error, the others are details.
        kind = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if kind in _DISK_ERRORS:
            raise FileError(
                f"cannot read or write {file} ({error.orig}): {_DISK_ERRORS[kind]}. What was recorded is unchanged"
            ) from None
        raise FileError(f"{file} is damaged or was altered ({error.orig}); restore it from a copy") from None
    except OSError as error:
        place = error.filename or file
        raise FileError(
            f"cannot read or write {place}: {disk_failure(error)}. What was recorded is unchanged"
        ) from None
    except (SQLAlchemyError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RemendError):
            raise
        raise FileError(f"{file} holds values that a patch registry cannot hold ({error}); it was altered") from None


def _parse_entry(row: Mapping[str, Any], file: Path) -> PatchEntry:
    """Return a row of the edits table as an entry.

    Raises:
        FileError: a value is not of the kind that was written.
    """
    # SQLite stores any type in any column, and the hash becomes a path: so every value is checked.
    texts = all(isinstance(row[key], str) for key in ("file", "state", "added", "who", "why"))
    if not texts or not re.fullmatch("[0-9a-f]{64}", row["file"]) or row["state"] not in STATES:
        raise FileError(f"{file}: the record of edit {row['id']!r} is malformed; it was altered")
    requests = row["requests"]
    if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
        raise FileError(f"{file}: the requests of edit {row['id']!r} are malformed; it was altered")
    return PatchEntry(**{**row, "requests": tuple(requests)})


def _parse_event(row: Mapping[str, Any], file: Path) -> PatchEvent:
    """Return a row of the events table as an event.

    Raises:
        FileError: a value is not of the kind that was written.
    """
    texts = all(isinstance(row[key], str) for key in ("what", "at", "who", "why"))
    measured = row["measured"]
    known = row["what"] in (EVENT_ADDED, EVENT_ACTIVATED, EVENT_REVERTED) and (
        measured is None or isinstance(measured, dict)
    )
    if not texts or not known or not isinstance(row["edit"], int):
        raise FileError(f"{file}: event {row['id']!r} is malformed; it was altered")
    return PatchEvent(**row)
