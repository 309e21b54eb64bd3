"""``Book``: edits kept beside the record of who added, activated and reverted them, when and why.

    my-book/book.sqlite        the record
    my-book/edits/<sha256>/    the edits, each under the hash of its manifest, which holds that of its tensors

An edit's folder is written before its record, and both under the record's lock: a process that is killed in between
leaves a folder that nobody speaks of, which :meth:`PatchRegistry.verify` finds and removes. Which edits act is told by
the
events alone, in order, so that the state after each of them can be had again: the sum of the same edits in the same
order, with the same bits.
"""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import nn

from remend.apps.acceptance import STANDARD, AcceptanceCriteria, RejectedError, judge
from remend.apps.patch_registry.conflicts import Conflict, ConflictError, find_conflicts
from remend.apps.patch_registry.database import (
    ACTIVATED,
    ACTIVE,
    ADDED,
    DATABASE,
    DRAFT,
    REVERTED,
    TAKEN_OFF,
    Database,
    Entry,
    Event,
    active_after,
)
from remend.edit import Edit, utc_now
from remend.errors import EditError, FileError, RemendError, WrongBaseError
from remend.fingerprint import HasModel, ModelFingerprint
from remend.serialization import MANIFEST, atomic_folder, file_sha256, remove_temporary_folders
from remend.tasks import Task

FOLDER, STAGED = "edits", ".adding"


@dataclass(frozen=True)
class Fault:
    """Something that :meth:`PatchRegistry.verify` found.

    Attributes:
        what: in words.
        repaired: whether it was put right.
        lost: whether an edit that is recorded cannot be had any more, or is not what it was.
    """

    what: str
    repaired: bool = False
    lost: bool = False


class PatchRegistry:
    """A patch book; several processes may use one at once.

    Attributes:
        path: its folder.
        model: the name of the model whose edits it records.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a book.

        Raises:
            FileError: the folder holds none, or it is damaged.
        """
        self.path = Path(path)
        if not (self.path / DATABASE).is_file():
            raise FileError(f"{path} is no book: it has no {DATABASE}. Make one with remend book init")
        self._refuse_links(self.path / DATABASE, self.path / FOLDER)
        self._records = Database(self.path)
        about = self._records.about()
        self.model: str = about["model"]
        self._config: str = about["config"]

    @staticmethod
    def create(path: str | Path, model: nn.Module | HasModel) -> PatchRegistry:
        """A new book of a model's edits, which may be without its weights (:func:`remend.models.skeleton`).

        Raises:
            FileError: ``path`` holds something already, or cannot be written.
        """
        path = Path(path)
        if (path / DATABASE).exists():
            raise FileError(f"{path} is a book already; add edits to it, or choose another folder")
        base = ModelFingerprint.of(model, ())
        with atomic_folder(path, lambda there: False) as staged:
            (staged / FOLDER).mkdir()
            Database(staged).create(base.name, base.config, utc_now())
        return PatchRegistry(path)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        """All edits, in the order in which they were added."""
        with self._records.reading() as connection:
            return self._records.entries(connection)

    @property
    def events(self) -> list[Event]:
        """All that was done, in order."""
        with self._records.reading() as connection:
            return self._records.events(connection)

    def entry(self, number: int) -> Entry:
        """One edit's record.

        Raises:
            EditError: there is none of that number.
        """
        return _chosen(self.entries, number, self.path)

    def load(self, number: int) -> Edit:
        """One of the edits.

        Raises:
            EditError: there is none of that number.
            FileError: its folder is gone, or is not what was added.
        """
        return self._read(self.entry(number))

    def active(self, revision: int | None = None) -> dict[int, Edit]:
        """The edits that act, or that acted after some event, by number, in the order in which they were activated.

        Raises:
            EditError: there is no such event.
        """
        with self._records.reading() as connection:
            entries, events = self._records.entries(connection), self._records.events(connection)
        if revision is not None and not 0 <= revision <= len(events):
            raise EditError(f"{self.path} has revisions 0 to {len(events)}, not {revision}")
        own = {entry.id: entry for entry in entries}
        return {number: self._read(own[number]) for number in active_after(events, revision)}

    def edit(self, revision: int | None = None) -> Edit | None:
        """What acts, or acted after some event, as one edit; None where nothing does."""
        active = list(self.active(revision).values())
        return reduce(add, active) if active else None

    # -- writing -------------------------------------------------------------------------------------------------

    def add(self, edit: Edit, why: str = "", who: str | None = None) -> Entry:
        """Record an edit, as a draft. One that is in the book already is not added again, but for files that are gone.

        Raises:
            WrongBaseError: it is of another model.
            FileError: it cannot be written.
        """
        if edit.base.config != self._config:
            raise WrongBaseError(f"{self.path} is a book of {self.model!r}, and this edit is of {edit.base.name!r}")
        added, name = utc_now(), who or _user()
        with self._records.writing() as connection:
            staged = edit.save(self.path / FOLDER / STAGED)
            file = file_sha256(staged / MANIFEST)
            place = self.path / FOLDER / file
            known = {entry.file: entry for entry in self._records.entries(connection)}.get(file)
            if known is not None and not self._lost(known):
                shutil.rmtree(staged)
                return known
            # What stands there was altered, or left by a process that was killed before it could record it.
            if place.is_symlink():
                place.unlink()
            shutil.rmtree(place, ignore_errors=True)
            staged.rename(place)
            if known is not None:
                return known
            requests = [request.to_json() for request in edit.requests]
            number = self._records.add(connection, file=file, added=added, who=name, why=why, requests=requests)
            self._records.note(connection, None, edit=number, what=ADDED, at=added, who=name, why=why, measured=None)
            return _chosen(self._records.entries(connection), number, self.path)

    def activate(
        self,
        number: int,
        task: Task,
        acceptance: AcceptanceCriteria = STANDARD,
        why: str = "",
        who: str | None = None,
        force: bool = False,
    ) -> tuple[list[Conflict], Any]:
        """Have an edit act, if it is accepted and goes together with those that do.

        It is measured on the model with all that acts already. If the book changes meanwhile, it is measured anew.

        Args:
            number: the edit's.
            task: the base model.
            acceptance: what is asked of it.
            why: what for.
            who: who does it; by default the user of this process.
            force: have it act whatever is found; that is recorded.

        Returns:
            The conflicts and the :class:`~remend.apps.acceptance.AcceptanceResult`, which are recorded too.

        Raises:
            EditError: there is no such edit, or it acts already.
            ConflictError: it contradicts or undoes one that acts; it was not activated.
            RejectedError: it is not accepted; it was not activated.
        """
        while True:
            seen = len(self.events)
            active = self.active()
            if number in active:
                raise EditError(f"edit {number} of {self.path} acts already")
            edit = self.load(number)
            conflicts = find_conflicts(task, edit, active)
            if conflicts and not force:
                raise ConflictError(conflicts)
            verdict = judge(task, edit, acceptance, list(active.values()))
            if not verdict.ok and not force:
                raise RejectedError(verdict)
            measured = {
                "verdict": verdict.to_json(),
                "conflicts": [one.to_json() for one in conflicts],
                "forced": force,
            }
            if self.switch(number, ACTIVE, why, who, measured, seen):
                return conflicts, verdict

    def revert(self, number: int, why: str = "", who: str | None = None) -> None:
        """Have an edit act no more. It stays in the book, and can be activated again.

        Raises:
            EditError: there is no such edit, or it does not act.
        """
        self.switch(number, REVERTED, why, who)

    def switch(
        self,
        number: int,
        state: str,
        why: str = "",
        who: str | None = None,
        measured: dict[str, Any] | None = None,
        seen: int | None = None,
    ) -> bool:
        """Record that an edit acts, or acts no more, without asking whether it should.

        Args:
            number: the edit's.
            state: ``active`` or ``reverted``.
            why: what for.
            who: who does it.
            measured: what was measured before.
            seen: the revision at which that was.

        Returns:
            Whether it was recorded: not if the book is at another revision than ``seen``.

        Raises:
            EditError: there is no such edit, or it is in that state.
        """
        with self._records.writing() as connection:
            entry = _chosen(self._records.entries(connection), number, self.path)
            events = self._records.events(connection)
            if seen is not None and len(events) != seen:
                return False
            if (entry.state == ACTIVE) == (state == ACTIVE):
                raise EditError(f"edit {number} of {self.path} is {entry.state}")
            if state == ACTIVE:
                self._read(entry)  # what cannot be had must not act
            what = ACTIVATED if state == ACTIVE else TAKEN_OFF
            self._records.note(
                connection, state, edit=number, what=what, at=utc_now(), who=who or _user(), why=why, measured=measured
            )
        return True

    # -- whether all is well -------------------------------------------------------------------------------------

    def verify(self, repair: bool = False) -> list[Fault]:
        """Compare the record with the files, and with itself.

        Args:
            repair: remove what a process that was killed left behind.

        Returns:
            What is wrong. Nothing is lost as long as no fault says so.
        """
        faults: list[Fault] = []
        if not self._records.sound():
            faults.append(Fault(f"{DATABASE} is damaged inside: restore it from a copy", lost=True))
        with self._records.writing() as connection:  # so that nothing is being added
            entries, events = self._records.entries(connection), self._records.events(connection)
            if [one.id for one in events] != list(range(1, len(events) + 1)):
                faults.append(Fault("the numbers of the events have gaps: some were taken out", lost=True))
            acting = set(active_after(events))
            for entry in entries:
                own = [one for one in events if one.edit == entry.id]
                state = ACTIVE if entry.id in acting else DRAFT if len(own) == 1 else REVERTED
                if not own or own[0].what != ADDED or state != entry.state:
                    faults.append(Fault(f"edit {entry.id} is {entry.state}, but its history says otherwise", lost=True))
                try:
                    self._read(entry)
                except RemendError as error:
                    faults.append(Fault(f"edit {entry.id}: {error}", lost=True))
            known = {entry.file for entry in entries}
            for folder in sorted((self.path / FOLDER).iterdir()):
                if folder.name not in known:
                    if repair:
                        shutil.rmtree(folder, ignore_errors=True)
                    faults.append(Fault(f"{folder.name} was left behind by a process that was stopped", repair))
            if repair:
                remove_temporary_folders(self.path / FOLDER)
        return faults

    def _read(self, entry: Entry) -> Edit:
        """The edit of a record, which must be the very one that was added."""
        folder = self.path / FOLDER / entry.file
        self._refuse_links(folder, *(folder.iterdir() if folder.is_dir() else ()))
        if not (folder / MANIFEST).is_file():
            gone = f"{MANIFEST} of edit {entry.id} is gone from" if folder.is_dir() else f"edit {entry.id} is gone:"
            raise FileError(f"{gone} {folder}; restore it from a copy, or add the same edit again")
        if file_sha256(folder / MANIFEST) != entry.file:
            raise FileError(f"{folder} is not what was added as edit {entry.id}: its manifest was altered")
        return Edit.load(folder)

    def _lost(self, entry: Entry) -> bool:
        """Whether the files of a record are no longer what was added."""
        try:
            self._read(entry)
        except RemendError:
            return True
        return False

    def _refuse_links(self, *places: Path) -> None:
        """A book that came from elsewhere must not have other files read."""
        for place in places:
            if place.is_symlink():
                raise FileError(f"{place} is a link, and links of a book are not followed; put the file itself there")


def _chosen(entries: Sequence[Entry], number: int, path: Path) -> Entry:
    for entry in entries:
        if entry.id == number:
            return entry
    known = f"it has 1 to {len(entries)}" if entries else "it has none yet"
    raise EditError(f"{path} has no edit {number}: {known}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
