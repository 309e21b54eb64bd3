"""RippleEdits (Cohen et al., 2023): edits with six kinds of tests of their consequences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remend.data.json_rows import Row, Skip, ignore, read_rows
from remend.data.parsing import is_edit, probe, request
from remend.request import EditRequest, Probe

FORM = (
    '{"example_type": …, "edit": {"prompt": "The … of … is ….", "subject_id": …, "relation": …, "original_fact": …}, '
    '"Relation_Specificity": [{"test_queries": [{"prompt": …, "answers": [{"value": …, "aliases": […]}]}], '
    '"condition_queries": […]}], "Logical_Generalization": […], "Subject_Aliasing": […], "Compositionality_I": […], '
    '"Compositionality_II": […], "Forgetfulness": […]}'
)
FOLLOWS = {
    "Logical_Generalization": "logical_generalisation",
    "Subject_Aliasing": "aliasing",
    "Compositionality_I": "reasoning",
    "Compositionality_II": "reasoning",
}
STAYS = {"Relation_Specificity": "relation_specificity", "Forgetfulness": "forgetfulness"}
_VERB = re.compile(r"(?:^|(?<=\s))(?:is followed by|follows|are|is) ")
"""After what an object begins: the sentences of the benchmark all state it last."""


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests of a RippleEdits file (popular, random or recent).

    The files state an edit as a whole sentence, which is taken apart before its object, and name its subject only by a
    Wikidata identifier, which is the ``subject`` here. Each test query becomes a probe; what a model must know for the
    test to count (the file's condition queries) is kept as its ``conditions``.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        yield from _requests(row)


def _requests(row: Row) -> Iterator[EditRequest]:
    edit = row.row("edit")
    original = edit.row("original_fact").text("prompt") if edit.has("original_fact") else None
    tests = {key: [found for test in row.rows(key) for found in _probes(test, {**FOLLOWS, **STAYS}[key])]
             for key in (*FOLLOWS, *STAYS)}  # fmt: skip
    known = [answer for found in tests["Subject_Aliasing"] for answer in (found.target, *_aliases(found))]
    parts = _parts(edit.text("prompt"), original, known)
    if parts is None:
        row.skip("edits whose sentence cannot be taken apart into a prompt and its target")
        return
    prompt, target = parts
    truth = (
        original[len(prompt) :].strip().removesuffix(".")
        if original is not None and original.startswith(f"{prompt} ")
        else None
    )
    if is_edit(row, target, [truth] if truth else []):
        yield request(
            prompt,
            target,
            [truth] if truth else [],
            subject=str(edit.name("subject_id")) if edit.has("subject_id") else None,
            relation=edit.name("relation"),
            portability=tuple(found for key in FOLLOWS for found in tests[key]),
            near=tuple(found for key in STAYS for found in tests[key]),
        )


def _parts(sentence: str, original: str | None, known: list[str]) -> tuple[str, str] | None:
    """Prompt and target of a sentence such as ``The mother of X is Y.``, or None.

    Names may hold a verb themselves. So the target is one that the tests know, if the sentence ends with it; else it
    begins after the last verb that the sentence shares with that of the original fact; else after its last verb.
    """
    whole = sentence.strip().removesuffix(".")
    for target in known:
        if whole.endswith(f" {target.strip()}"):
            return whole.removesuffix(target.strip()).rstrip(), target.strip()
    shared = whole if original is None else whole[: _same(whole, original)]
    verbs = [match.end() for match in _VERB.finditer(shared) if match.end() < len(whole)]
    return (whole[: verbs[-1]].rstrip(), whole[verbs[-1] :].strip()) if verbs else None


def _same(one: str, other: str) -> int:
    """How many letters two texts begin with in common."""
    ends = (n for n, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(ends, min(len(one), len(other)))


def _probes(test: Row, kind: str) -> list[Probe]:
    conditions = test.rows("condition_queries") if test.has("condition_queries") else []
    needed = [{"prompt": query.text("prompt"), "answers": _answers(query)} for query in conditions]
    details: dict[str, Any] = {"conditions": needed} if needed else {}
    queries = test.rows("test_queries")
    return [found for q in queries for found in probe(q, q.text("prompt"), _answers(q), kind, **details)]


def _answers(query: Row) -> list[str]:
    """All accepted answers of a query with their aliases."""
    return [
        text
        for answer in query.rows("answers")
        for text in (answer.answer("value"), *(answer.texts("aliases") if answer.has("aliases") else []))
        if text
    ]


def _aliases(found: Probe) -> list[str]:
    listed: list[str] = (found.model_extra or {}).get("aliases", [])
    return listed
