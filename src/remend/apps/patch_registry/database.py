"""What a book's database holds: edits, and everything that was done with them, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from remend.errors import FileError

DATABASE = "book.sqlite"
VERSION = 1
DRAFT, ACTIVE, REVERTED = "draft", "active", "reverted"
STATES = (DRAFT, ACTIVE, REVERTED)
ADDED, ACTIVATED, TAKEN_OFF = "added", "activated", "reverted"
PATIENCE = 60.0
"""Seconds that a process waits for another one that writes."""

TABLES = MetaData()
BOOK = Table(
    "book", TABLES,
    Column("version", Integer, nullable=False),
    Column("model", String, nullable=False),
    Column("config", String, nullable=False),
    Column("created", String, nullable=False),
)  # fmt: skip
EDITS = Table(
    "edits", TABLES,
    Column("id", Integer, primary_key=True),
    Column("file", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("added", String, nullable=False),
    Column("who", String, nullable=False),
    Column("why", String, nullable=False),
    Column("requests", JSON, nullable=False),
)  # fmt: skip
EVENTS = Table(
    "events", TABLES,
    Column("id", Integer, primary_key=True),
    Column("edit", Integer, ForeignKey("edits.id"), nullable=False),
    Column("what", String, nullable=False),
    Column("at", String, nullable=False),
    Column("who", String, nullable=False),
    Column("why", String, nullable=False),
    Column("measured", JSON),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One edit of a book.

    Attributes:
        id: its number in the book.
        file: the SHA-256 of its manifest, under which its folder is kept.
        state: ``draft``, ``active`` or ``reverted``.
        added: when, ISO 8601, UTC.
        who, why: who added it, and what for.
        requests: what it does, as in the edit's manifest.
    """

    id: int
    file: str
    state: str
    added: str
    who: str
    why: str
    requests: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Event:
    """Something that was done with an edit.

    Attributes:
        id: its number, which is the book's revision after it.
        edit: with which.
        what: ``added``, ``activated`` or ``reverted``.
        at: when, ISO 8601, UTC.
        who, why: who did it, and what for.
        measured: what was measured before: the verdict and conflicts.
    """

    id: int
    edit: int
    what: str
    at: str
    who: str
    why: str
    measured: Mapping[str, Any] | None


class Database:
    """The database of a book.

    Reading sees one state of it, and writing is one transaction: all of it, or nothing. A process that writes keeps
    others out, and one that is killed leaves what was before.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / DATABASE
        self.engine: Engine = create_engine(f"sqlite:///{self.file}", connect_args={"timeout": PATIENCE})
        event.listen(self.engine, "connect", _plainly)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Within it, the database does not change under one's eyes."""
        with _explained(self.file), self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection
            connection.exec_driver_sql("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Within it, nobody else writes; what was written is kept if it ends well."""
        with _explained(self.file), self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")

    def create(self, model: str, config: str, now: str) -> None:
        """An empty database."""
        with self.writing() as connection:
            TABLES.create_all(connection)
            connection.execute(insert(BOOK).values(version=VERSION, model=model, config=config, created=now))
        self.engine.dispose()

    def about(self) -> Mapping[str, Any]:
        """Which model the book is of.

        Raises:
            FileError: the database is damaged, or of an unknown version.
        """
        with self.reading() as connection:
            rows = connection.execute(select(BOOK)).mappings().all()
        if len(rows) != 1 or not all(isinstance(rows[0][key], str) for key in ("model", "config", "created")):
            raise FileError(f"{self.file} does not say which model it is of; it was altered")
        if rows[0]["version"] != VERSION:
            raise FileError(f"{self.file} is of version {rows[0]['version']!r}; this release reads {VERSION}")
        return dict(rows[0])

    def entries(self, connection: Connection) -> list[Entry]:
        """All edits, in the order in which they were added."""
        found = [dict(row) for row in connection.execute(select(EDITS).order_by(EDITS.c.id)).mappings()]
        return [_entry(row, self.file) for row in found]

    def events(self, connection: Connection) -> list[Event]:
        """All that was done, in order."""
        found = [dict(row) for row in connection.execute(select(EVENTS).order_by(EVENTS.c.id)).mappings()]
        return [_event(row, self.file) for row in found]

    @staticmethod
    def add(connection: Connection, **values: Any) -> int:
        """Record an edit, and return its number."""
        key = connection.execute(insert(EDITS).values(state=DRAFT, **values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    @staticmethod
    def note(connection: Connection, state: str | None, **values: Any) -> None:
        """Record what was done with an edit, and the state that it is in now."""
        connection.execute(insert(EVENTS).values(**values))
        if state is not None:
            connection.execute(update(EDITS).where(EDITS.c.id == values["edit"]).values(state=state))

    def sound(self) -> bool:
        """Whether SQLite finds its own file in order."""
        with self.reading() as connection:
            return [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")] == ["ok"]


def active_after(events: list[Event], revision: int | None = None) -> list[int]:
    """The edits that act after some event (all of them by default), in the order in which they were activated."""
    found: dict[int, None] = {}
    for one in events:
        if revision is not None and one.id > revision:
            break
        if one.what == ACTIVATED:
            found.setdefault(one.edit)
        elif one.what == TAKEN_OFF:
            found.pop(one.edit, None)
    return list(found)


def _plainly(connection: Any, _: Any) -> None:
    """Let transactions begin where they are said to, and keep what was committed through a loss of power."""
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Say what is wrong with a database in words."""
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig)
        if "locked" in reason:
            raise FileError(
                f"{file} is being written by another process, and was not free within {PATIENCE:.0f} s; try again"
            ) from None
        if "unable to open" in reason or "readonly" in reason:
            raise FileError(f"cannot open or write {file} ({reason}); is it there, and may you write it?") from None
        raise FileError(f"{file} is damaged or was altered ({reason}); restore it from a copy") from None
    except (SQLAlchemyError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{file} holds what a book does not ({error}); it was altered") from None


def _entry(row: Mapping[str, Any], file: Path) -> Entry:
    texts = all(isinstance(row[key], str) for key in ("file", "state", "added", "who", "why"))
    if not texts or not re.fullmatch("[0-9a-f]{64}", row["file"]) or row["state"] not in STATES:
        raise FileError(f"{file}: the record of edit {row['id']!r} is malformed; it was altered")
    requests = row["requests"]
    if not isinstance(requests, list) or not all(isinstance(own, dict) for own in requests):
        raise FileError(f"{file}: the requests of edit {row['id']!r} are malformed; it was altered")
    return Entry(**{**row, "requests": tuple(requests)})


def _event(row: Mapping[str, Any], file: Path) -> Event:
    texts = all(isinstance(row[key], str) for key in ("what", "at", "who", "why"))
    measured = row["measured"]
    known = row["what"] in (ADDED, ACTIVATED, TAKEN_OFF) and (measured is None or isinstance(measured, dict))
    if not texts or not known or not isinstance(row["edit"], int):
        raise FileError(f"{file}: event {row['id']!r} is malformed; it was altered")
    return Event(**row)
