"""The data sets that remend reads: what each is, where it comes from, and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from remend.assets import ATLAS, CLAIMS, QUESTIONS
from remend.data import atlas, claims, counterfact, fever, knowedit, mquake, nq, questions, ripple, zsre
from remend.data.json_rows import Skip
from remend.request import EditRequest

Reader = Callable[[Path, Skip], Iterator[EditRequest]]

BUILT_IN: dict[str, Callable[[str], tuple[EditRequest, ...]]] = {
    ATLAS: atlas.requests,
    QUESTIONS: questions.requests,
    CLAIMS: claims.requests,
}
"""What ships with remend, by name: ``atlas:train`` and so on."""
PASSAGES = "passages"
"""Requests that a model makes of a plain text (:func:`remend.data.passages.generation_requests`)."""


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        what: one line about it.
        form: what a row of its files looks like.
        licence: under which it was published.
        url: where it comes from.
        read: the requests of one of its files; None where they are made with a model.
    """

    what: str
    form: str
    licence: str
    url: str
    read: Reader | None


DATA_SETS = {
    "counterfact": DataSet(
        "false completions, with neighbours of the same true and of the same new answer",
        counterfact.FORM,
        "MIT",
        "https://rome.baulab.info/data/dsets/",
        counterfact.read,
    ),
    "zsre": DataSet(
        "questions with rephrasings and an unrelated question each",
        zsre.FORM,
        "MIT",
        "https://github.com/eric-mitchell/mend",
        zsre.read,
    ),
    "mquake": DataSet(
        "edits, one or several a case, and questions of several hops that follow from them",
        mquake.FORM,
        "see its page",
        "https://github.com/princeton-nlp/MQuAKE",
        mquake.read,
    ),
    "ripple": DataSet(
        "RippleEdits: edits with six kinds of tests of their consequences",
        ripple.FORM,
        "MIT",
        "https://github.com/edenbiran/RippleEdits",
        ripple.read,
    ),
    "knowedit": DataSet(
        "wiki_counterfact, wiki_recent and ZsRE with portability and locality by kind",
        knowedit.FORM,
        "MIT",
        "https://huggingface.co/datasets/zjunlp/KnowEdit",
        knowedit.read,
    ),
    "fever": DataSet(
        "claims whose labels are flipped, or pairs of evidence and claim with their twins; for classifiers",
        fever.FORM,
        "CC BY-SA 3.0 (FEVER), MIT (FeverSymmetric)",
        "https://fever.ai/dataset/fever.html",
        fever.read,
    ),
    "nq": DataSet(
        "NQ-open: true answers to open questions",
        nq.FORM,
        "Apache-2.0",
        "https://github.com/google-research-datasets/natural-questions",
        nq.read,
    ),
    PASSAGES: DataSet(
        "passages of any plain text, to be continued as a model once sampled; convert makes them with --model",
        "plain text; blank lines separate passages",
        "that of the text",
        "https://arxiv.org/abs/2110.11309",
        None,
    ),
}
