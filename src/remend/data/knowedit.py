"""KnowEdit (Zhang et al., 2024): edits with probes of what follows from them and of what must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from remend.data.json_rows import JsonRow, json_reader
from remend.data.json_stream import shorten
from remend.data.parsing import distinct_paraphrases, is_edit, make_probes, make_request
from remend.errors import nearest
from remend.request import EditRequest, Probe

# The files differ in the case of these keys, so they are compared in lower case.
_PORTABILITY_KINDS = {
    "reasoning": "reasoning",
    "subject_aliasing": "aliasing",
    "logical_generalization": "logical_generalisation",
}
_LOCALITY_KINDS = {"relation_specificity": "relation_specificity", "forgetfulness": "forgetfulness"}


@json_reader(
    '{"subject": …, "prompt": …, "target_new": …, "ground_truth": …, "portability": {"Reasoning": [{"prompt": …, '
    '"ground_truth": …}], …}, "locality": {"Relation_Specificity": […], …}}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield the requests of KnowEdit's wiki_counterfact, wiki_recent or ZsRE file.

    ``portability`` and ``near`` probes are named by kind: ``reasoning``, ``aliasing`` and ``logical_generalisation``;
    ``relation_specificity`` (another relation of the same subject) and ``forgetfulness`` (another object of a relation
    that may have several). Of several answers the first is the target, the others are ``aliases``.
    """
    for row in rows:
        yield from parse_row(row)


def parse_row(row: JsonRow) -> Iterator[EditRequest]:
    """Yield the request of a row, if it changes anything.

    A plain list at ``locality`` or ``portability`` (as in MEND's dev split of zsRE) holds unrelated questions or
    consequences of no kind.
    """
    prompt, targets = row.text("prompt"), _answers(row, "target_new")
    truths = _answers(row, "ground_truth") if row.has("ground_truth") else []
    paraphrases = [text for key in ("rephrase_prompt", "rephrase") if row.has(key) for text in row.texts(key)]
    portability = _parse_probes(row, "portability", _PORTABILITY_KINDS)
    locality = _parse_probes(row, "locality", _LOCALITY_KINDS)
    target = targets[0] if targets else ""
    if is_edit(row, target, truths):
        # Lists by kind hold neighbors of the edited fact; a plain list holds unrelated questions.
        unrelated = isinstance(row.content.get("locality"), list)
        yield make_request(
            prompt,
            target,
            truths,
            subject=row.text("subject"),
            id=row.name("case_id"),
            paraphrases=distinct_paraphrases(row, prompt, paraphrases),
            aliases=targets[1:],
            portability=tuple(portability),
            **{"locality" if unrelated else "near": tuple(locality)},
        )


def _parse_probes(row: JsonRow, key: str, kinds: Mapping[str, str]) -> list[Probe]:
    """Return the probes at ``key``, which holds lists by kind or one plain list."""
    if not row.has(key):
        return []
    if isinstance(row.content[key], list):
        return [probe for entry in row.rows(key) for probe in _parse_probe(entry, None)]
    probes, by_kind = [], row.row(key)
    for name in by_kind.content:
        if name.lower() not in kinds:
            # An error rather than a skipped kind: a misspelled kind would silently leave its metric out.
            raise by_kind.error(f"there is no kind {shorten(name)} of probes; {nearest(name.lower(), kinds)}")
        probes += [probe for entry in by_kind.rows(name) for probe in _parse_probe(entry, kinds[name.lower()])]
    return probes


def _parse_probe(row: JsonRow, kind: str | None) -> list[Probe]:
    return make_probes(row, row.text("prompt"), _answers(row, "ground_truth"), kind)


def _answers(row: JsonRow, key: str) -> list[str]:
    """Return accepted answers from one text, a list, or a list of answers each with its aliases."""
    value = row.content.get(key)
    if isinstance(value, list) and any(isinstance(part, list) for part in value):
        parts = [part if isinstance(part, list) else [part] for part in value]
        flat = {**row.content, key: [text for part in parts for text in part]}
        return JsonRow(flat, row.where, row.form).texts(key)
    return row.texts(key)
