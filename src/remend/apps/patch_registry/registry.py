"""``PatchRegistry``: stores edits, and records who added, activated and reverted them, when and why.

    my-registry/book.sqlite        the database
    my-registry/edits/<sha256>/    the edits, each named by the hash of its manifest, which holds that of its tensors

An edit's folder is written before its record, both under the database's write lock, and a staging folder names it
meanwhile: what a process leaves that is killed in between, the next :meth:`PatchRegistry.add` removes. The events
alone, in order, determine which edits are active. So the state after any event can be restored bit for bit: the sum of
the same edits in the same order.
"""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from torch import nn

from remend.apps.acceptance import (
    STANDARD_CRITERIA,
    AcceptanceCriteria,
    AcceptanceResult,
    RejectedError,
    check_acceptance,
)
from remend.apps.patch_registry.conflicts import Conflict, ConflictError, find_conflicts, find_disagreements
from remend.apps.patch_registry.consistency import contradictions
from remend.apps.patch_registry.database import (
    ACTIVE,
    DATABASE,
    EVENT_ACTIVATED,
    EVENT_ADDED,
    EVENT_REVERTED,
    REVERTED,
    Database,
    PatchEntry,
    PatchEvent,
    active_after,
)
from remend.edit import EDIT_FORMATS, Edit, utc_now
from remend.errors import EditError, FileError, RemendError, WrongBaseError
from remend.fingerprint import HasModel, ModelFingerprint
from remend.saved_folders import MANIFEST, atomic_folder, file_sha256, is_saved_by_remend, read_manifest
from remend.staging import (
    NEW,
    PREFIX,
    abandoned,
    readable_write_errors,
    remove_abandoned,
    remove_entry,
    staging_folder,
)
from remend.tasks import Task

EDITS_FOLDER = "edits"


@dataclass(frozen=True)
class Fault:
    """A fault that :meth:`PatchRegistry.verify` found.

    Attributes:
        what: the fault in words.
        repaired: whether it was repaired.
        lost: whether something that was recorded is gone or was altered.
    """

    what: str
    repaired: bool = False
    lost: bool = False


class PatchRegistry:
    """A folder that stores and records the edits of one model; several processes may use it at once.

    Attributes:
        path: the folder.
        model: the name of the model whose edits it records.
    """

    def __init__(self, path: str | Path) -> None:
        """Open an existing registry.

        Raises:
            FileError: the folder holds no registry, or a damaged one.
        """
        self.path = Path(path)
        if not (self.path / DATABASE).is_file():
            raise FileError(f"{path} is not a patch registry: it has no {DATABASE}. Create one with remend book init")
        # SQLite also opens files that are called like the database, with an ending.
        self._refuse_links(*self.path.glob(f"{DATABASE}*"), self.path / EDITS_FOLDER)
        self._database = Database(self.path)
        info = self._database.info()
        self.model: str = info["model"]
        self._config: str = info["config"]

    @staticmethod
    def create(path: str | Path, model: nn.Module | HasModel) -> PatchRegistry:
        """Create an empty registry for the edits of a model.

        Args:
            path: the folder to create.
            model: the base model or its task; the structure is enough (:func:`remend.models.skeleton`).

        Raises:
            FileError: ``path`` holds something already, or cannot be written.
        """

        def replaceable(existing: Path) -> bool:
            if (existing / DATABASE).exists():
                raise FileError(f"{path} is a patch registry already; add edits to it, or choose another folder")
            return False

        base = ModelFingerprint.of(model, ())
        with atomic_folder(path, replaceable) as staged:
            (staged / EDITS_FOLDER).mkdir()
            Database(staged).create(base.name, base.config, utc_now())
        return PatchRegistry(path)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[PatchEntry]:
        """All edits in the order in which they were added."""
        with self._database.reading() as connection:
            return self._database.entries(connection)

    @property
    def events(self) -> list[PatchEvent]:
        """All events in order."""
        with self._database.reading() as connection:
            return self._database.events(connection)

    def entry(self, number: int) -> PatchEntry:
        """Return the record of one edit.

        Raises:
            EditError: there is no edit of that number.
        """
        return _find_entry(self.entries, number, self.path)

    def load(self, number: int) -> Edit:
        """Load one of the edits.

        Raises:
            EditError: there is no edit of that number.
            FileError: its folder is gone, or is not what was added.
        """
        return self._read(self.entry(number))

    def active(self, revision: int | None = None) -> dict[int, Edit]:
        """Load the active edits, by number, in the order in which they were activated.

        Args:
            revision: the number of an event, for the edits that were active after it; by default the last event.

        Raises:
            EditError: there is no such event.
        """
        with self._database.reading() as connection:
            entries, events = self._database.entries(connection), self._database.events(connection)
        if revision is not None and not 0 <= revision <= len(events):
            raise EditError(f"{self.path} has revisions 0 to {len(events)}, not {revision}")
        return {
            number: self._read(_find_entry(entries, number, self.path)) for number in active_after(events, revision)
        }

    def edit(self, revision: int | None = None) -> Edit | None:
        """Return the sum of the active edits (as of ``revision``, if given), or None where no edit is active."""
        active = list(self.active(revision).values())
        return Edit.sum(active) if active else None

    # -- writing -------------------------------------------------------------------------------------------------

    def add(self, edit: Edit, why: str = "", who: str | None = None) -> PatchEntry:
        """Add an edit as a draft, and return its record.

        An edit that is in the registry already is not added again; if its files were lost, they are restored.

        Args:
            edit: the edit.
            why: the reason, for the record.
            who: who adds it; by default the user of this process.

        Raises:
            WrongBaseError: the edit is of another model.
            FileError: it cannot be written.
        """
        if edit.base.config != self._config:
            raise WrongBaseError(
                f"{self.path} is a patch registry of {self.model!r}, and this edit is of {edit.base.name!r}"
            )
        added, name = utc_now(), who or _user_name()
        with readable_write_errors(self.path), staging_folder(self.path / EDITS_FOLDER, self._undo_add) as staging:
            try:
                with self._database.writing() as connection:
                    return self._add(connection, staging, edit, added, name, why)
            except BaseException:
                self._undo_add(staging)
                raise

    def _add(self, connection: Connection, staging: Path, edit: Edit, added: str, who: str, why: str) -> PatchEntry:
        """Add an edit within a write transaction; :meth:`_undo_add` removes its folder if that is not committed."""
        staged = edit.save(staging / NEW)
        file = file_sha256(staged / MANIFEST)
        folder = self.path / EDITS_FOLDER / file
        recorded = {entry.file: entry for entry in self._database.entries(connection)}.get(file)
        if recorded is not None and not self._is_lost(recorded):
            return recorded
        (staging / file).touch()
        remove_entry(folder)  # a folder of that name was altered
        staged.rename(folder)
        if recorded is not None:
            return recorded
        requests = [request.to_json() for request in edit.requests]
        number = self._database.add_edit(connection, file=file, added=added, who=who, why=why, requests=requests)
        event = {"edit": number, "what": EVENT_ADDED, "at": added, "who": who, "why": why, "measured": None}
        self._database.add_event(connection, None, **event)
        return _find_entry(self._database.entries(connection), number, self.path)

    def _undo_add(self, staging: Path) -> None:
        """Remove the folders of edits that a stopped :meth:`add` has put in place and not recorded."""
        added = [entry.name for entry in staging.iterdir() if re.fullmatch("[0-9a-f]{64}", entry.name)]
        if not added:
            return
        with self._database.writing() as connection:  # nobody else may be adding the same edit
            recorded = {entry.file for entry in self._database.entries(connection)}
            for name in set(added) - recorded:
                remove_entry(self.path / EDITS_FOLDER / name)

    def activate(
        self,
        number: int,
        task: Task,
        criteria: AcceptanceCriteria = STANDARD_CRITERIA,
        why: str = "",
        who: str | None = None,
        force: bool = False,
        replace: bool = False,
    ) -> tuple[list[Conflict], AcceptanceResult]:
        """Activate an edit, if it is accepted and does not conflict with the active ones.

        It is measured on the model with all active edits. If the registry changes meanwhile, it is measured again.

        Args:
            number: the edit's number.
            task: the base model.
            criteria: what the edit must meet.
            why: the reason, for the record.
            who: who activates it; by default the user of this process.
            force: activate it also if it fails or conflicts; that is recorded.
            replace: revert the active edits that want other answers to its prompts: the later one wins. Each of them
                must be contradicted as a whole.

        Returns:
            The conflicts and the acceptance result, which are recorded too.

        Raises:
            EditError: there is no such edit, it is active already, or it and the active ones make no one edit.
            ConflictError: it contradicts or undoes an active edit; it was not activated.
            RejectedError: it is not accepted; it was not activated.
        """
        while True:
            revision = len(self.events)
            active = self.active()
            if number in active:
                raise EditError(f"edit {number} of {self.path} is active already")
            edit = self.load(number)
            replaced = self._contradicted(task, edit, active) if replace else []
            active = {other: acting for other, acting in active.items() if other not in replaced}
            self._check_adds_up(number, edit, active)
            conflicts = find_conflicts(task, edit, active)
            if conflicts and not force:
                raise ConflictError(conflicts)
            result = check_acceptance(task, edit, criteria, list(active.values()))
            if not result.ok and not force:
                raise RejectedError(result)
            measured = {
                "verdict": result.to_json(),
                "conflicts": [conflict.to_json() for conflict in conflicts],
                "forced": force,
            }
            if self.set_state(number, ACTIVE, why, who, measured, revision, replaced):
                return conflicts, result

    @staticmethod
    def _contradicted(task: Task, edit: Edit, active: dict[int, Edit]) -> list[int]:
        """Return the numbers of the active edits all requests of which an edit contradicts.

        Raises:
            EditError: it contradicts only a part of one, which would be reverted as a whole.
        """
        wanted = find_disagreements(task, edit, active)
        numbers = sorted({conflict.edit for conflict in wanted})
        for number in numbers:
            contradicted = sum(conflict.edit == number for conflict in wanted)
            if contradicted < (count := len(active[number].requests)):
                raise EditError(
                    f"edit {number} has {count} requests, of which {contradicted} are contradicted: reverting it would "
                    "lose the others. Make an edit of those and activate it, and revert the old one"
                )
        return numbers

    def _check_adds_up(self, number: int, edit: Edit, active: dict[int, Edit]) -> None:
        """Raise :class:`EditError` unless an edit and the active ones add up to one, which is what is served."""
        for other, acting in active.items():
            try:
                acting + edit
            except EditError as error:
                raise EditError(
                    f"edit {number} cannot act together with edit {other}: {error}. What acts is served as one "
                    f"edit: make it anew so, or revert edit {other}"
                ) from None

    def revert(self, number: int, why: str = "", who: str | None = None) -> None:
        """Deactivate an edit. It stays in the registry and can be activated again.

        Raises:
            EditError: there is no such edit, or it is not active.
        """
        self.set_state(number, REVERTED, why, who)

    def set_state(
        self,
        number: int,
        state: str,
        why: str = "",
        who: str | None = None,
        measured: dict[str, Any] | None = None,
        revision: int | None = None,
        replaced: Sequence[int] = (),
    ) -> bool:
        """Record that an edit is active, or no longer active, without checking it.

        Args:
            number: the edit's number.
            state: ``active`` or ``reverted``.
            why: the reason, for the record.
            who: who does it; by default the user of this process.
            measured: what was measured before, for the record.
            revision: record it only if the registry is still at this revision.
            replaced: active edits that are reverted before, since this one takes their place.

        Returns:
            Whether it was recorded.

        Raises:
            EditError: there is no such edit, or it is in that state already.
        """
        with self._database.writing() as connection:
            entry = _find_entry(self._database.entries(connection), number, self.path)
            events = self._database.events(connection)
            if revision is not None and len(events) != revision:
                return False
            if (entry.state == ACTIVE) == (state == ACTIVE):
                raise EditError(f"edit {number} of {self.path} is {entry.state}")
            if state == ACTIVE:
                self._read(entry)  # an edit whose files are lost must not become active
            common = {"at": utc_now(), "who": who or _user_name()}
            for other in replaced:
                taken_over = {"edit": other, "what": EVENT_REVERTED, "why": f"replaced by edit {number}"}
                self._database.add_event(connection, REVERTED, **taken_over, **common, measured=None)
            what = EVENT_ACTIVATED if state == ACTIVE else EVENT_REVERTED
            self._database.add_event(connection, state, edit=number, what=what, why=why, measured=measured, **common)
        return True

    # -- checking -------------------------------------------------------------------------------------

    def verify(self, repair: bool = False) -> list[Fault]:
        """Compare the records with the files and with each other, and return what is wrong.

        Args:
            repair: remove what killed processes left behind.
        """
        edits_folder = self.path / EDITS_FOLDER
        with readable_write_errors(self.path):
            left = list(abandoned(edits_folder))
            if repair:
                remove_abandoned(edits_folder, self._undo_add)
            faults = [_left_behind(staging, repair and not staging.exists()) for staging in left]
        if not self._database.is_intact():
            faults.append(Fault(f"{DATABASE} is damaged inside: restore it from a copy", lost=True))
        with self._database.writing() as connection:  # the lock keeps others from adding edits meanwhile
            entries, events = self._database.entries(connection), self._database.events(connection)
            faults += [Fault(text, lost=True) for text in contradictions(entries, events)]
            for entry in entries:
                try:
                    self._read(entry)
                except RemendError as error:
                    faults.append(Fault(f"edit {entry.id}: {error}", lost=True))
            recorded = {entry.file for entry in entries}
            for path in sorted(edits_folder.iterdir() if edits_folder.is_dir() else ()):
                if path.name not in recorded and not path.name.startswith(PREFIX):
                    faults.append(_check_unrecorded(path, repair))
        return faults

    def _read(self, entry: PatchEntry) -> Edit:
        """Load the edit of a record, and make sure that it is what was added."""
        folder = self.path / EDITS_FOLDER / entry.file
        self._refuse_links(folder, *(folder.iterdir() if folder.is_dir() else ()))
        if not (folder / MANIFEST).is_file():
            missing = f"{MANIFEST} of edit {entry.id} is gone from" if folder.is_dir() else f"edit {entry.id} is gone:"
            raise FileError(f"{missing} {folder}; restore it from a copy, or add the same edit again")
        if file_sha256(folder / MANIFEST) != entry.file:
            raise FileError(f"{folder} is not what was added as edit {entry.id}: its manifest was altered")
        edit = Edit.load(folder)
        # The record's copy of the requests is what people are shown. Both were written at once, by the same code.
        requests = read_manifest(folder, *EDIT_FORMATS).get("requests")
        if json.dumps(requests, sort_keys=True) != json.dumps(list(entry.requests), sort_keys=True):
            raise FileError(
                f"the record of edit {entry.id} in {self.path} has other requests than the edit's {MANIFEST}: the "
                "record was altered; restore it from a copy"
            )
        if edit.base.config != self._config:
            raise FileError(
                f"edit {entry.id} is of {edit.base.name!r}, which has another configuration than the model that "
                f"{self.path} is for: the record was altered; restore it from a copy"
            )
        return edit

    def _is_lost(self, entry: PatchEntry) -> bool:
        """Return whether the files of a record are no longer what was added."""
        try:
            self._read(entry)
        except RemendError:
            return True
        return False

    def _refuse_links(self, *paths: Path) -> None:
        """Raise FileError for symbolic links."""
        # A registry that came from elsewhere must not have files outside of it read.
        for path in paths:
            if path.is_symlink():
                raise FileError(
                    f"{path} is a link; links in a patch registry are not followed: put the file itself there"
                )


def _left_behind(path: Path, repaired: bool) -> Fault:
    return Fault(f"{path.name} was left behind by a process that was stopped", repaired)


def _check_unrecorded(path: Path, repair: bool) -> Fault:
    """Return the fault of something beside the edits that no record names; remove it, if remend wrote it."""
    if path.is_symlink() or not path.is_dir() or (any(path.iterdir()) and not is_saved_by_remend(path)):
        return Fault(f"{path} is nothing that remend wrote, and is left alone: move it elsewhere")
    if repair:
        remove_entry(path)
    return _left_behind(path, repair and not path.exists())


def _find_entry(entries: Sequence[PatchEntry], number: int, path: Path) -> PatchEntry:
    for entry in entries:
        if entry.id == number:
            return entry
    numbers = f"it has 1 to {len(entries)}" if entries else "it has none yet"
    raise EditError(f"{path} has no edit {number}: {numbers}")


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
