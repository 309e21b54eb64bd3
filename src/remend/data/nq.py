"""NQ-open (Lee et al., 2019): questions with short answers, of which a model knows some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from remend.data.json_rows import Skip, ignore, read_rows
from remend.data.parsing import aliases, is_edit, request
from remend.data.zsre import question
from remend.request import EditRequest

FORM = '{"question": …, "answer": […]}'


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests that teach the true answers of NQ-open's questions; the first accepted answer is the target.

    The ``ground_truth`` is the target itself. Their prompts and targets are locality probes for edits of other things.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        asked, accepted = question(row.text("question")), row.texts("answer")
        if is_edit(row, accepted[0] if accepted else "", []):
            yield request(asked, accepted[0], accepted[:1], aliases=aliases(accepted))
