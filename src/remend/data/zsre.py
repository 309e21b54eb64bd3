"""zsRE, the questions of Levy et al. (2017), in the forms in which it is handed around for model editing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from remend.data import knowedit
from remend.data.json_rows import Row, Skip, ignore, read_rows
from remend.data.parsing import is_edit, others, probe, request
from remend.request import EditRequest

FORM = (
    'MEND\'s {"input": …, "output": [{"answer": …}], "alternatives": […], "filtered_rephrases": […]}, '
    'EasyEdit\'s {"subject": …, "src": …, "rephrase": …, "alt": …, "loc": …, "loc_ans": …}, or KnowEdit\'s '
    '{"subject": …, "prompt": …, "target_new": …, "ground_truth": …, "rephrase_prompt": …, "locality": …}'
)
_OPENING = "nq question: "


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests of a zsRE file: MEND's rows, EasyEdit's or KnowEdit's.

    In MEND's form, the first of the ``alternatives`` is the target, and the subject is the page of the evidence that
    the question names. Its files have no unrelated questions; those of a dev split in KnowEdit's form have.

    In EasyEdit's form, ``alt`` is the target. Where a row has ``answers`` (or, without them, ``pred``), they are the
    truth and the target is counterfactual. Where it has neither, as in the training file, the target is itself the
    truth: such a request teaches a right answer, and its ``ground_truth`` is its target.

    The unrelated question (from Natural Questions) becomes ``locality``, without its ``nq question: `` and with one
    question mark, as all other questions have.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        form = next((read for key, read in _FORMS.items() if key in row.content), _easyedit)
        yield from form(row)


def _mend(row: Row) -> Iterator[EditRequest]:
    prompt, outputs = row.text("input"), row.rows("output")
    truths, alternatives = [output.text("answer") for output in outputs], row.texts("alternatives")
    rephrased = row.texts("filtered_rephrases")
    pages = [page.text("title") for output in outputs if output.has("provenance") for page in output.rows("provenance")]
    if is_edit(row, alternatives[0] if alternatives else "", truths):
        yield request(
            prompt,
            alternatives[0],
            truths,
            subject=next((title for title in pages if title.casefold() in prompt.casefold()), None),
            id=row.name("id"),
            paraphrases=others(row, prompt, rephrased),
        )


_FORMS = {"input": _mend, "prompt": knowedit.requests}


def _easyedit(row: Row) -> Iterator[EditRequest]:
    prompt, target, paraphrase = row.text("src"), row.answer("alt"), row.text("rephrase")
    known = next((row.texts(key) for key in ("answers", "pred") if key in row.content), None)
    far = probe(row, question(row.text("loc")), [row.answer("loc_ans")])
    if is_edit(row, target, known or []):
        yield request(
            prompt,
            target,
            [target] if known is None else known,
            subject=row.text("subject"),
            id=row.name("case_id"),
            paraphrases=others(row, prompt, [paraphrase]),
            locality=tuple(far),
        )


def question(text: str) -> str:
    """A question of Natural Questions, which stand there without question marks, as a question."""
    return text.strip().removeprefix(_OPENING).rstrip(" ?") + "?"
