"""MQuAKE (Zhong et al., 2023): edits with multi-hop questions whose answers follow from them."""

from __future__ import annotations

from collections.abc import Iterator

from remend.data.json_rows import JsonRow, json_reader
from remend.data.parsing import fill_template, is_edit, make_probes, make_request
from remend.request import EditRequest


@json_reader(
    '{"case_id": …, "requested_rewrite": [{"prompt": "… {} …", "subject": …, "question": …, "relation_id": …, '
    '"target_new": {"str": …}, "target_true": {"str": …}}], "questions": […], "new_answer": …, "new_answer_alias": […]}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield the requests of an MQuAKE file (CF, CF-3k or T): one for each rewrite of a case.

    A rewrite's question is the same request in another form (``formats``). The case's multi-hop questions are
    ``portability`` of kind ``reasoning``, but only where the case has a single rewrite: with several, the new answer
    follows from all of them together and from none alone.
    """
    for row in rows:
        rewrites = row.rows("requested_rewrite")
        for number, rewrite in enumerate(rewrites, start=1):
            yield from _parse_rewrite(row, rewrite, number if len(rewrites) > 1 else None)


def _parse_rewrite(row: JsonRow, rewrite: JsonRow, number: int | None) -> Iterator[EditRequest]:
    """Yield the request of one rewrite; ``number`` is its place in a case of several, else None."""
    subject = rewrite.text("subject")
    prompt = fill_template(rewrite, "prompt", subject)
    target, truth = rewrite.row("target_new").answer("str"), _truth(rewrite)
    questions, case = row.texts_if_any("questions"), row.name("case_id")
    answers = [row.answer("new_answer"), *row.texts_if_any("new_answer_alias")] if questions else []
    portability = (
        []
        if number
        else [probe for question in questions for probe in make_probes(row, question, answers, "reasoning")]
    )
    # Reported once for a case, not for each of its rewrites.
    if number == 1 and questions:
        row.skip("questions of several hops that follow from several edits together")
    if is_edit(rewrite, target, [truth]):
        yield make_request(
            prompt,
            target,
            [truth],
            subject=subject,
            # The rewrites of a case share its number, and identifiers should differ.
            id=f"{case} {number}" if number else case,
            relation=rewrite.name("relation_id"),
            formats=tuple(rewrite.texts_if_any("question")),
            portability=tuple(portability),
        )


def _truth(rewrite: JsonRow) -> str:
    return rewrite.row("target_true").answer("str") if rewrite.has("target_true") else ""
