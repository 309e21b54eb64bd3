"""zsRE, the questions of Levy et al. (2017), in the forms in which it is handed around for model editing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from remend.data import knowedit
from remend.data.making import is_edit, others, probe, request
from remend.data.rows import Row, Skip, ignore, read_rows
from remend.request import EditRequest

FORM = (
    'EasyEdit\'s {"subject": …, "src": …, "rephrase": …, "alt": …, "loc": …, "loc_ans": …}, or KnowEdit\'s and MEND\'s '
    '{"subject": …, "prompt": …, "target_new": …, "ground_truth": …, "rephrase_prompt": …, "locality": …}'
)
_OPENING = "nq question: "


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests of a zsRE file: EasyEdit's rows, or those of MEND's dev split or of KnowEdit.

    In EasyEdit's form, ``alt`` is the target. Where a row has ``answers`` (or, without them, ``pred``), they are the
    truth and the target is counterfactual. Where it has neither, as in the training file, the target is itself the
    truth: such a request teaches a right answer, and its ``ground_truth`` is its target.

    The unrelated question (from Natural Questions) becomes ``locality``, without its ``nq question: `` and with one
    question mark, as all other questions have.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        yield from knowedit.requests(row) if "prompt" in row.content else _requests(row)


def _requests(row: Row) -> Iterator[EditRequest]:
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
