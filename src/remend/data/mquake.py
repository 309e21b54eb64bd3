"""MQuAKE (Zhong et al., 2023): edits and questions of several hops whose answers follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from remend.data.json_rows import Row, Skip, ignore, read_rows
from remend.data.parsing import filled, is_edit, probe, request
from remend.request import EditRequest

FORM = (
    '{"case_id": …, "requested_rewrite": [{"prompt": "… {} …", "subject": …, "question": …, "relation_id": …, '
    '"target_new": {"str": …}, "target_true": {"str": …}}], "questions": […], "new_answer": …, "new_answer_alias": […]}'
)


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests of an MQuAKE file (CF, CF-3k or T): one for each rewrite of a case.

    A rewrite's question is the same request in another form (``formats``). The case's questions of several hops are
    ``portability`` of kind ``reasoning``, but only where the case has a single rewrite: with several, the new answer
    follows from all of them together and from none alone.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        rewrites = row.rows("requested_rewrite")
        for number, rewrite in enumerate(rewrites, start=1):
            yield from _requests(row, rewrite, number if len(rewrites) > 1 else None)


def _requests(row: Row, rewrite: Row, number: int | None) -> Iterator[EditRequest]:
    subject = rewrite.text("subject")
    prompt = filled(rewrite, "prompt", subject)
    target, truth = rewrite.row("target_new").answer("str"), rewrite.row("target_true").text("str").strip()
    questions, case = row.texts("questions"), row.name("case_id")
    accepted = [row.answer("new_answer"), *(row.texts("new_answer_alias") if row.has("new_answer_alias") else [])]
    follows = [] if number else [found for q in questions for found in probe(row, q, accepted, "reasoning")]
    if number == 1:
        row.skip("questions of several hops that follow from several edits together")
    if is_edit(rewrite, target, [truth]):
        yield request(
            prompt,
            target,
            [truth],
            subject=subject,
            id=f"{case} {number}" if number else case,
            relation=rewrite.name("relation_id"),
            formats=(rewrite.text("question"),),
            portability=tuple(follows),
        )
