"""``edit_in_parts``: one edit of many requests, whose parts are kept on disk until the edit is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from remend.edit import Edit
from remend.editors.base import Editor
from remend.editors.request_checks import refuse_conflicts
from remend.errors import ConfigError, FileError
from remend.progress import report_progress, reported_to
from remend.request import EditRequest
from remend.saved_folders import remove_saved
from remend.tasks.base import Task

REQUESTS_PER_PART = 8
"""Requests of a part, at least: about a minute of work on one thread, which is lost if it is stopped."""


def edit_in_parts(
    editor: Editor, task: Task, requests: Sequence[EditRequest], folder: Path, resume: bool = False
) -> Edit:
    """Return the edit of all ``requests``, as :meth:`Editor.edit`, of an editor whose edits are added up.

    Each part is saved as soon as it is made, so that the work can be stopped, and nothing but the finished edits is
    held in memory. The parts stay where they are: :func:`remove_parts` removes them once the edit is saved.

    Args:
        editor: the editor, whose :attr:`EditorInfo.sequence <remend.editors.info.EditorInfo.sequence>` is ``unedited``.
        task: the model.
        requests: what to edit.
        folder: where the parts are kept.
        resume: whether to go on with the parts that are there; otherwise they are made anew.

    Raises:
        RequestError: two requests want different answers to one prompt, or one does not fit.
        ConfigError: the edits of this editor are not added up.
        FileError: a part that is there is of another edit, or cannot be read or written.
    """
    if editor.info.sequence != "unedited":
        raise ConfigError(f"{editor.info.name} makes one edit of all requests at once: call its edit()")
    base = editor.check(task, requests)
    refuse_conflicts(task, requests)
    parts = list(parts_by_subject(requests))
    edits: list[Edit] = []
    for number, part in enumerate(parts):
        report_progress("making edits", sum(map(len, parts[:number])), len(requests))
        kept = folder / f"{number:05d}"
        if resume and kept.exists():
            edit = Edit.load(kept)
            other_model = not edit.base.is_compatible(base)
            if other_model or _description(edit.requests, edit.editor) != _description(part, editor.describe()):
                raise FileError(
                    f"{kept} is a part of an edit of other requests, or by another editor or of another model: give "
                    "the same as before, or begin anew without --resume"
                )
        else:
            with reported_to(lambda what, done, total: None):  # steps of one request say nothing of how far all are
                made = editor.edit(task, part)
            assert isinstance(made, Edit), "edits that are added up change weights"
            made.save(kept)
            edit = made
        edits.append(edit)
    return Edit.sum(edits)


def remove_parts(folder: Path) -> None:
    """Remove the parts that a folder holds, and the folder if it holds nothing else; what cannot be removed is left."""
    for part in folder.glob("[0-9]" * 5):
        remove_saved(part)
    with suppress(OSError):
        folder.rmdir()


def _description(requests: Sequence[EditRequest], editor: Mapping[str, Any]) -> str:
    """Return what a part is of, as its file says it."""
    return json.dumps([[request.to_json() for request in requests], dict(editor)], sort_keys=True)


def parts_by_subject(requests: Sequence[EditRequest]) -> Iterator[list[EditRequest]]:
    """Split requests into parts of at least :data:`REQUESTS_PER_PART`; those about one subject stay together."""
    by_subject: dict[str, list[EditRequest]] = {}
    for request in requests:
        by_subject.setdefault(request.key, []).append(request)
    part: list[EditRequest] = []
    for together in by_subject.values():
        part += together
        if len(part) >= REQUESTS_PER_PART:
            yield part
            part = []
    if part:
        yield part
