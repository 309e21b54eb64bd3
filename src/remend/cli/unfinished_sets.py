"""``UnfinishedSets``: the sets of a command that makes many, kept as they are made, so that it can be stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remend.data.edit_sets import EditSet, parse_item
from remend.errors import FileError
from remend.request import EditRequest
from remend.saved_folders import write_text


class UnfinishedSets:
    """The sets of a command that makes many, each kept in a file as soon as it is made.

    Args:
        file: the file.
        requests: all requests.
        settings: what the sets depend on beside them.
        resume: whether to go on with what the file holds.

    Attributes:
        sets: those that are made.

    Raises:
        FileError: the file is of another command, or cannot be written.
    """

    def __init__(self, file: Path, requests: Sequence[EditRequest], settings: dict[str, Any], resume: bool) -> None:
        self.file = file
        self.sets: list[EditSet] = []
        about = json.dumps({**settings, "requests": [request.to_json() for request in requests]})
        if not resume:
            write_text(file, f"{about}\n")
            return
        try:
            first, *lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read {file}, where a stopped command would have left its sets: {error}") from None
        if first != about:
            raise FileError(f"{file} holds sets of other requests or settings: give the same as before, or no --resume")
        for line in lines[:-1]:  # what follows the last line break was not written whole
            try:
                request, *items = json.loads(line)
                made = tuple(parse_item(item, str(file)) for item in items)
                self.sets.append(EditSet(EditRequest.from_json(json.dumps(request)), made))
            except ValueError as error:  # no JSON, or no request
                raise FileError(f"{file} is damaged ({error}): delete it, and begin anew without --resume") from None
        whole = "\n".join([first, *lines[:-1]])
        write_text(file, f"{whole}\n")

    def add(self, edit_set: EditSet) -> None:
        """Keep one more set."""
        self.sets.append(edit_set)
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"[{', '.join(edit_set.lines())}]\n")
        except OSError as error:
            raise FileError(f"cannot write {self.file}: {error}") from None

    def remove(self) -> None:
        """Remove the file: all is done."""
        self.file.unlink(missing_ok=True)
