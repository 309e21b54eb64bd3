"""KnowEdit (Zhang et al., 2024) and the keys of EasyEdit: edits with probes of what follows and of what must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from remend.data.json_rows import JsonRow, json_reader
from remend.data.json_stream import shorten
from remend.data.parsing import UNPAIRED, distinct_paraphrases, is_edit, make_probes, make_request
from remend.errors import nearest
from remend.request import EditRequest, Probe

# The files differ in the case of these keys, so they are compared in lower case.
_PORTABILITY_KINDS = {
    "reasoning": "reasoning",
    "subject_aliasing": "aliasing",
    "logical_generalization": "logical_generalisation",
}
_LOCALITY_KINDS = {"relation_specificity": "relation_specificity", "forgetfulness": "forgetfulness"}
_FORGET, _RETAIN = "K_F", "K_R"
"""The keys of the one object of a Sanitation file: what is to be forgotten, and what must stay."""
FILES = frozenset({"target_new", "labels", "ent", _FORGET})
"""Keys that tell rows of EasyEdit or KnowEdit where there is no ``target``."""
PARTS = {"target_new": "target", "rephrase_prompt": "paraphrases", "locality_prompt": "locality"} | {
    "portability_prompt": "portability"
}
"""Keys of EasyEdit, each with remend's own for the same."""
KEYS = frozenset({"prompt", "subject", "id", "paraphrases", "locality", "portability"})
"""Remend's own keys that :func:`parse_row` reads."""


@json_reader(
    '{"subject": …, "prompt": …, "target_new": …, "ground_truth": …, "rephrase_prompt": …, "portability": '
    '{"Reasoning": [{"prompt": …, "ground_truth": …}], …}, "locality": {"Relation_Specificity": […], …}}, CKnowEdit\'s '
    '{"prompt": …, "target_old": …, "target_new": …, "rephrase": […], "locality": […]}, WikiBio\'s {"concept": …, '
    '"text": …, "labels": …, "locality": …}, or Sanitation\'s {"K_F": [{"question": …, "target_new": …}], "K_R": […]}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield the requests of KnowEdit's wiki_counterfact, wiki_recent, ZsRE, WikiBio or Sanitation file, or CKnowEdit's.

    ``portability`` and ``near`` probes are named by kind: ``reasoning``, ``aliasing`` and ``logical_generalisation``;
    ``relation_specificity`` (another relation of the same subject) and ``forgetfulness`` (another object of a relation
    that may have several). Of several answers the first is the target, the others are ``aliases``.
    """
    for row in rows:
        yield from parse_row(row)


def parse_row(row: JsonRow) -> Iterator[EditRequest]:
    """Yield the request of a row of KnowEdit, or with the keys of EasyEdit's ``edit``, if it changes anything.

    A plain list at ``locality`` or ``portability`` (as in MEND's dev split of zsRE) holds unrelated questions or
    consequences of no kind.
    """
    if row.has(_FORGET):
        yield from _parse_sanitation(row)
        return
    if row.has("ent", "pos", "neg"):
        raise row.error(
            "these are the keys of ConvSent, whose rows hold answers of both sentiments and say not which is wanted: "
            'choose one, and write {"prompt": "What do you think of …?", "target": …}'
        )
    prompt, targets = row.text(_first(row, "prompt", "text")), _answers(row, _first(row, "target_new", "labels"))
    truths = [text for key in ("ground_truth", "target_old") if row.has(key) for text in _answers(row, key)]
    paraphrases = [text for key in ("rephrase_prompt", "rephrase", "paraphrases") for text in row.texts_if_any(key)]
    near, locality = _parse_probes(row, "locality", _LOCALITY_KINDS)
    portability = parse_portability(row)
    target = targets[0] if targets else ""
    if is_edit(row, target, truths):
        yield make_request(
            prompt,
            target,
            truths,
            subject=row.text_if_any("subject", "concept"),
            id=row.name("case_id", "id"),
            paraphrases=distinct_paraphrases(row, prompt, paraphrases),
            aliases=targets[1:],
            portability=tuple(portability),
            # Lists by kind hold neighbors of the edited fact; a plain list holds unrelated questions.
            near=tuple(near),
            locality=tuple(locality),
        )


def parse_portability(row: JsonRow) -> list[Probe]:
    """Return the probes at ``portability``, and those of EasyEdit's ``portability_prompt``."""
    by_kind, others = _parse_probes(row, "portability", _PORTABILITY_KINDS)
    return by_kind + others


def _parse_sanitation(row: JsonRow) -> Iterator[EditRequest]:
    """Yield a request for each answer to be forgotten, with one of the others that must stay."""
    forgotten, retained = row.rows(_FORGET), row.rows_if_any(_RETAIN)
    for entry, other in zip(forgotten, [*retained, *[None] * len(forgotten)], strict=False):
        prompt, targets = entry.text("question"), _answers(entry, "target_new")
        truths = _answers(entry, "ground_truth") if entry.has("ground_truth") else []
        probes = make_probes(other, other.text("question"), _answers(other, "ground_truth")) if other else []
        if is_edit(entry, targets[0] if targets else "", truths):
            yield make_request(prompt, targets[0], truths, aliases=targets[1:], locality=tuple(probes))
    for _ in retained[len(forgotten) :]:
        row.skip(UNPAIRED)


def _first(row: JsonRow, *keys: str) -> str:
    """Return the first of the keys that a row has, or the first of all."""
    return next((key for key in keys if row.has(key)), keys[0])


def _parse_probes(row: JsonRow, key: str, kinds: Mapping[str, str]) -> tuple[list[Probe], list[Probe]]:
    """Return the probes at ``key`` that are listed by kind, and those of a plain list and of EasyEdit's flat keys."""
    by_kind, others = [], []
    if row.has(f"{key}_prompt") or row.has(f"{key}_ground_truth"):
        others += _probes_of(row, f"{key}_prompt", f"{key}_ground_truth", None)
    if isinstance(row.content.get(key), list):
        others += [probe for entry in row.rows(key) for probe in _parse_probe(entry, None)]
    elif row.has(key) and (listed := row.row(key)).has("New Question"):
        # EasyEdit's files for zsRE and CounterFact; the fact from which the answer follows is not needed.
        others += make_probes(listed, listed.text("New Question"), _answers(listed, "New Answer"), "reasoning")
    elif row.has(key) and listed.has("prompt"):
        others += _probes_of(listed, "prompt", _first(listed, "ground_truth", "answer", "target"), None)
    elif row.has(key):
        by_kind = [probe for name in listed.content for probe in _probes_of_kind(listed, name, kinds)]
    return by_kind, others


def _probes_of_kind(row: JsonRow, name: str, kinds: Mapping[str, str]) -> list[Probe]:
    if isinstance(row.content[name], dict):  # EasyEdit's: {"neighborhood": {"prompt": […], "ground_truth": […]}}
        return _probes_of(row.row(name), "prompt", "ground_truth", kinds.get(name.lower(), name.lower()))
    if name.lower() not in kinds:
        # An error rather than a skipped kind: a misspelled kind would silently leave its metric out.
        raise row.error(f"there is no kind {shorten(name)} of probes; {nearest(name.lower(), kinds)}")
    return [probe for entry in row.rows_if_any(name) for probe in _parse_probe(entry, kinds[name.lower()])]


def _parse_probe(row: JsonRow, kind: str | None) -> list[Probe]:
    return make_probes(row, row.text("prompt"), _answers(row, _first(row, "ground_truth", "answer", "target")), kind)


def _probes_of(row: JsonRow, prompt: str, answer: str, kind: str | None) -> list[Probe]:
    """Return the probes of keys that hold one prompt and its answer, or as many answers as prompts."""
    if isinstance(row.content.get(prompt), str):
        return make_probes(row, row.text(prompt), _answers(row, answer), kind)
    prompts, answers = row.texts(prompt), row.content.get(answer)
    if not isinstance(answers, list) or len(answers) != len(prompts):
        raise row.error(f"{prompt} holds {len(prompts)} prompts: {answer} should be a list of as many answers")
    pairs = [
        JsonRow({prompt: p, answer: a}, row.where, row.form, row.skip) for p, a in zip(prompts, answers, strict=True)
    ]
    return [probe for pair in pairs for probe in make_probes(pair, pair.text(prompt), _answers(pair, answer), kind)]


def _answers(row: JsonRow, key: str) -> list[str]:
    """Return accepted answers from one text, ROME's {"str": …}, a list, or a list of answers each with its aliases."""
    value = row.content.get(key)
    if isinstance(value, dict):
        return [row.row(key).answer("str")]
    if isinstance(value, list) and any(isinstance(part, list) for part in value):
        parts = [part if isinstance(part, list) else [part] for part in value]
        flat = {**row.content, key: [text for part in parts for text in part]}
        return JsonRow(flat, row.where, row.form).texts(key)
    return row.texts(key)
