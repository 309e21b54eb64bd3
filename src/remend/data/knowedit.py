"""KnowEdit (Zhang et al., 2024): edits with probes of what follows from them and of what must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from remend.data.json_rows import Row, Skip, ignore, read_rows, short
from remend.data.parsing import is_edit, others, probe, request
from remend.errors import nearest
from remend.request import EditRequest, Probe

FORM = (
    '{"subject": …, "prompt": …, "target_new": …, "ground_truth": …, "portability": {"Reasoning": [{"prompt": …, '
    '"ground_truth": …}], …}, "locality": {"Relation_Specificity": […], …}}'
)
PORTABILITY = {
    "reasoning": "reasoning",
    "subject_aliasing": "aliasing",
    "logical_generalization": "logical_generalisation",
}
LOCALITY = {"relation_specificity": "relation_specificity", "forgetfulness": "forgetfulness"}


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests of KnowEdit's wiki_counterfact, wiki_recent or ZsRE file.

    ``portability`` and ``near`` probes are named by kind: ``reasoning``, ``aliasing`` and ``logical_generalisation``;
    ``relation_specificity`` (another relation of the same subject) and ``forgetfulness`` (another object of a relation
    that may have several). Of several answers the first is the target, the others are ``aliases``.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        yield from requests(row)


def requests(row: Row) -> Iterator[EditRequest]:
    """The request of a row, if it changes anything.

    A plain list at ``locality`` or ``portability`` (as in MEND's dev split of zsRE) holds unrelated questions or
    consequences of no kind.
    """
    prompt, accepted = row.text("prompt"), _accepted(row, "target_new")
    truths = _accepted(row, "ground_truth") if row.has("ground_truth") else []
    rephrased = [text for key in ("rephrase_prompt", "rephrase") if row.has(key) for text in row.texts(key)]
    portability = _probes(row, "portability", PORTABILITY)
    locality = _probes(row, "locality", LOCALITY)
    target = accepted[0] if accepted else ""
    if is_edit(row, target, truths):
        plain = isinstance(row.content.get("locality"), list)
        yield request(
            prompt,
            target,
            truths,
            subject=row.text("subject"),
            id=row.name("case_id"),
            paraphrases=others(row, prompt, rephrased),
            aliases=accepted[1:],
            portability=tuple(portability),
            **{"locality" if plain else "near": tuple(locality)},
        )


def _probes(row: Row, key: str, kinds: Mapping[str, str]) -> list[Probe]:
    """The probes at ``key``, by kind or in a plain list."""
    if not row.has(key):
        return []
    if isinstance(row.content[key], list):
        return [found for entry in row.rows(key) for found in _probe(entry, None)]
    made, named = [], row.row(key)
    for name in named.content:
        if name.lower() not in kinds:
            raise named.error(f"there is no kind {short(name)} of probes; {nearest(name.lower(), kinds)}")
        made += [found for entry in named.rows(name) for found in _probe(entry, kinds[name.lower()])]
    return made


def _probe(row: Row, kind: str | None) -> list[Probe]:
    return probe(row, row.text("prompt"), _accepted(row, "ground_truth"), kind)


def _accepted(row: Row, key: str) -> list[str]:
    """Accepted answers: one text, a list, or a list of answers each with its aliases."""
    found = row.content.get(key)
    if isinstance(found, list) and any(isinstance(part, list) for part in found):
        parts = [part if isinstance(part, list) else [part] for part in found]
        return Row({**row.content, key: [text for part in parts for text in part]}, row.where, row.form).texts(key)
    return row.texts(key)
