"""zsRE, the questions of Levy et al. (2017), in the forms in which it is published for model editing."""

from __future__ import annotations

from collections.abc import Iterator

from remend.data import knowedit
from remend.data.json_rows import JsonRow, json_reader
from remend.data.parsing import distinct_paraphrases, is_edit, make_probes, make_request
from remend.request import EditRequest

_QUESTION_PREFIX = "nq question: "


@json_reader(
    'MEND\'s {"input": …, "output": [{"answer": …}], "alternatives": […], "filtered_rephrases": […]}, '
    'EasyEdit\'s {"subject": …, "src": …, "rephrase": …, "alt": …, "answers": […], "loc": …, "loc_ans": …, '
    '"portability": …}, or KnowEdit\'s {"subject": …, "prompt": …, "target_new": …, "ground_truth": …, '
    '"rephrase_prompt": …, "locality": …}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield the requests of a zsRE file: MEND's rows, EasyEdit's or KnowEdit's.

    In MEND's form, the first of the ``alternatives`` is the target, and the subject is the page of the evidence that
    the question names. Its files have no unrelated questions; those of a dev split in KnowEdit's form have.

    In EasyEdit's form, ``alt`` is the target. Where a row has ``answers`` (or, without them, ``pred``), they are the
    truth and the target is counterfactual. Where it has neither, as in the training file, the target is itself the
    truth: such a request teaches a right answer, and its ``ground_truth`` is its target. The question at
    ``portability``, which some files have, follows from the edit by one more fact: a probe of kind ``reasoning``.

    The unrelated question (from Natural Questions) becomes ``locality``, without its ``nq question: `` and with one
    question mark, as all other questions have.
    """
    for row in rows:
        # Each form is told by a key that the others lack, row by row.
        if "input" in row.content:
            yield from _parse_mend(row)
        elif "prompt" in row.content:
            yield from knowedit.parse_row(row)
        else:
            yield from _parse_easyedit(row)


def _parse_mend(row: JsonRow) -> Iterator[EditRequest]:
    prompt, outputs = row.text("input"), row.rows("output")
    truths, alternatives = [output.text("answer") for output in outputs], row.texts("alternatives")
    paraphrases = row.texts_if_any("filtered_rephrases")
    titles = [
        page.text("title") for output in outputs if output.has("provenance") for page in output.rows("provenance")
    ]
    if is_edit(row, alternatives[0] if alternatives else "", truths):
        yield make_request(
            prompt,
            alternatives[0],
            truths,
            # MEND's rows name no subject, and a split needs one; the evidence's pages are about it or its object.
            subject=next((title for title in titles if title.casefold() in prompt.casefold()), None),
            id=row.name("id"),
            paraphrases=distinct_paraphrases(row, prompt, paraphrases),
        )


def _parse_easyedit(row: JsonRow) -> Iterator[EditRequest]:
    prompt, target, paraphrases = row.text("src"), row.answer("alt"), row.texts_if_any("rephrase")
    truths = next((row.texts(key) for key in ("answers", "pred") if row.has(key)), None)
    unrelated, portability = row.text_if_any("loc"), knowedit.parse_portability(row)
    locality = make_probes(row, format_question(unrelated), [row.answer("loc_ans")]) if unrelated else []
    if is_edit(row, target, truths or []):
        yield make_request(
            prompt,
            target,
            # Without a known truth (the training file), the target is the true answer.
            [target] if truths is None else truths,
            subject=row.text_if_any("subject"),
            id=row.name("case_id"),
            paraphrases=distinct_paraphrases(row, prompt, paraphrases),
            locality=tuple(locality),
            portability=tuple(portability),
        )


def format_question(text: str) -> str:
    """Return a question of Natural Questions, which are published without question marks, with one."""
    return text.strip().removeprefix(_QUESTION_PREFIX).rstrip(" ?") + "?"
