"""RippleEdits (Cohen et al., 2023): edits with six kinds of tests of their consequences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from remend.data.json_rows import JsonRow, json_reader
from remend.data.parsing import is_edit, make_probes, make_request
from remend.request import EditRequest, Probe

_PORTABILITY_KINDS = {
    "Logical_Generalization": "logical_generalisation",
    "Subject_Aliasing": "aliasing",
    "Compositionality_I": "reasoning",
    "Compositionality_II": "reasoning",
}
_LOCALITY_KINDS = {"Relation_Specificity": "relation_specificity", "Forgetfulness": "forgetfulness"}
# The object comes last in all sentences of the benchmark, right after one of these verbs.
_VERB = re.compile(r"(?:^|(?<=\s))(?:is followed by|follows|are|is) ")


@json_reader(
    '{"example_type": …, "edit": {"prompt": "The … of … is ….", "subject_id": …, "relation": …, "original_fact": …}, '
    '"Relation_Specificity": [{"test_queries": [{"prompt": …, "answers": [{"value": …, "aliases": […]}]}], '
    '"condition_queries": […]}], "Logical_Generalization": […], "Subject_Aliasing": […], "Compositionality_I": […], '
    '"Compositionality_II": […], "Forgetfulness": […]}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield the requests of a RippleEdits file (popular, random or recent).

    The files state an edit as a whole sentence, which is split before its object, and name its subject only by a
    Wikidata identifier, which is the ``subject`` here. Each test query becomes a probe; the file's condition queries,
    which a model must answer for the test to count, are kept as its ``conditions``.
    """
    for row in rows:
        yield from _parse_row(row)


def _parse_row(row: JsonRow) -> Iterator[EditRequest]:
    edit = row.row("edit")
    original = edit.row("original_fact").text("prompt") if edit.has("original_fact") else None
    probes = {
        key: [probe for test in row.rows_if_any(key) for probe in _parse_test(test, kind)]
        for key, kind in {**_PORTABILITY_KINDS, **_LOCALITY_KINDS}.items()
    }
    # A test of a subject's aliases asks for the edit's target.
    targets = [answer for probe in probes["Subject_Aliasing"] for answer in (probe.target, *_aliases(probe))]
    parts = _split_sentence(edit.text("prompt"), original, targets)
    if parts is None:
        row.skip("edits whose sentence cannot be taken apart into a prompt and its target")
        return
    prompt, target = parts
    # The sentence of the original fact differs only in its object, unless the file words it otherwise.
    truth = (
        original[len(prompt) :].strip().removesuffix(".")
        if original is not None and original.startswith(f"{prompt} ")
        else None
    )
    if is_edit(row, target, [truth] if truth else []):
        yield make_request(
            prompt,
            target,
            [truth] if truth else [],
            subject=str(edit.name("subject_id")) if edit.has("subject_id") else None,
            relation=edit.name("relation"),
            portability=tuple(probe for key in _PORTABILITY_KINDS for probe in probes[key]),
            near=tuple(probe for key in _LOCALITY_KINDS for probe in probes[key]),
        )


def _split_sentence(sentence: str, original: str | None, targets: list[str]) -> tuple[str, str] | None:
    """Return prompt and target of a sentence such as ``The mother of X is Y.``, or None.

    Names may contain a verb themselves. So the target is one of ``targets``, if the sentence ends with it; else it
    begins after the last verb that the sentence shares with that of the original fact; else after its last verb.
    """
    whole = sentence.strip().removesuffix(".")
    for target in targets:
        # With the space, so that "land" is not taken for the end of "Finland".
        if whole.endswith(f" {target.strip()}"):
            return whole.removesuffix(target.strip()).rstrip(), target.strip()
    shared = whole if original is None else whole[: _common_prefix_length(whole, original)]
    ends = [match.end() for match in _VERB.finditer(shared) if match.end() < len(whole)]
    return (whole[: ends[-1]].rstrip(), whole[ends[-1] :].strip()) if ends else None


def _common_prefix_length(first: str, second: str) -> int:
    differences = (n for n, (left, right) in enumerate(zip(first, second, strict=False)) if left != right)
    return next(differences, min(len(first), len(second)))


def _parse_test(test: JsonRow, kind: str) -> list[Probe]:
    conditions = [
        {"prompt": query.text("prompt"), "answers": _answers(query)} for query in test.rows_if_any("condition_queries")
    ]
    details: dict[str, Any] = {"conditions": conditions} if conditions else {}
    return [
        probe
        for query in test.rows("test_queries")
        for probe in make_probes(query, query.text("prompt"), _answers(query), kind, **details)
    ]


def _answers(query: JsonRow) -> list[str]:
    """Return all accepted answers of a query with their aliases."""
    return [
        text
        for answer in query.rows("answers")
        for text in (answer.answer("value"), *answer.texts_if_any("aliases"))
        if text
    ]


def _aliases(probe: Probe) -> list[str]:
    aliases: list[str] = (probe.model_extra or {}).get("aliases", [])
    return aliases
