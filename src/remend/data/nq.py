"""NQ-open (Lee et al., 2019): questions with short answers, of which a model knows some."""

from __future__ import annotations

from collections.abc import Iterator

from remend.data.json_rows import JsonRow, json_reader
from remend.data.parsing import aliases, is_edit, make_request
from remend.data.zsre import format_question
from remend.request import EditRequest


@json_reader('{"question": …, "answer": […]}')
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield requests that teach the true answers of NQ-open's questions; the first accepted answer is the target.

    The ``ground_truth`` is the target itself. Prompts and targets can serve as locality probes for other edits.
    """
    for row in rows:
        question, answers = format_question(row.text("question")), row.texts("answer")
        if is_edit(row, answers[0] if answers else "", []):
            yield make_request(question, answers[0], answers[:1], aliases=aliases(answers))
