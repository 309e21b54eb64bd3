"""``expand``: make the set of a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import NonNegativeInt

from remend.config import Config
from remend.data.edit_sets import EditSet, SetItem
from remend.editors import make_or_load
from remend.editors.locate_then_edit.fit import Fit
from remend.errors import ModelError
from remend.expansion.implications import implications
from remend.expansion.mining import TRIAL_EDITS, Round, built_in_pool, mine
from remend.expansion.neighbours import neighbours
from remend.expansion.phrasings import phrasings
from remend.expansion.premise import Premise
from remend.expansion.writers import Writer, written_phrasings
from remend.request import EditRequest, Prompt
from remend.tasks.base import Task


@dataclass(frozen=True)
class ExpandConfig(Config):
    """How large a set is.

    Attributes:
        phrasings: the most other ways to ask.
        implications: the most prompts with answers that follow.
        near: the most prompts that must stay, those found by trial edits not counted.
        rounds: the most trial edits.
        mined: the most prompts that each trial edit adds.
    """

    phrasings: NonNegativeInt = 8
    implications: NonNegativeInt = 12
    near: NonNegativeInt = 24
    rounds: NonNegativeInt = 2
    mined: NonNegativeInt = 8


@dataclass(frozen=True)
class Expansion:
    """A set, and how it came about.

    Attributes:
        edit_set: the set.
        rounds: what each trial edit did to the pool.
        missing: what could not be made, and what is doubtful about the request, in sentences.
        seconds: the CPU time of each step, by name.
    """

    edit_set: EditSet
    rounds: Sequence[Round] = ()
    missing: Sequence[str] = ()
    seconds: dict[str, float] | None = None


def expand(
    task: Task,
    request: EditRequest,
    config: ExpandConfig | None = None,
    pool: Sequence[str] = (),
    text: Sequence[str] = (),
    seed: int = 0,
    writer: Writer | None = None,
) -> Expansion:
    """Make the set of prompts that should move with a request, and of those that should not.

    No model but the one that is edited takes part, unless a writer is given. The same seed gives the same set.

    Args:
        task: the unedited model, a decoder.
        request: the request; without a subject, that is looked for in its prompt.
        config: how large the set is.
        pool: texts that should stay, of which those that a trial edit disturbs join the set, beside built-in ones.
        text: ordinary text, on which the editor of trial edits measures the model; by default the model writes it.
        seed: of every random draw.
        writer: a model that writes phrasings, beside those that rules make; as many at the most.

    Raises:
        ModelError: the model is no decoder, or the writer does not answer.
        RequestError: the prompt is no text, names no subject, or what is given as one is not.
    """
    config = config or ExpandConfig()
    if not task.causal:
        raise ModelError("a set is made by how a decoder completes statements, and this model is none")
    clock, seconds = time.process_time(), dict[str, float]()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.process_time()
        seconds[name], clock = now - clock, now

    editor = make_or_load(Fit.info.name, task, text, seed, TRIAL_EDITS)
    assert isinstance(editor, Fit)
    assert editor.questions is not None
    lap("measuring the model")
    premise = Premise.of(task, request, editor.questions)
    asked = list(phrasings(premise, config.phrasings))
    if writer is not None:
        asked += written_phrasings(premise, writer, config.phrasings)
    lap("phrasings")
    follows = implications(premise, config.implications)
    lap("implications")
    near = neighbours(premise, config.near)
    lap("near prompts")
    edit_set = EditSet(premise.request, _distinct(premise, [*asked, *follows, *near]))
    edit_set, rounds = mine(premise, editor, edit_set, pool, built_in_pool(premise), config.rounds, config.mined)
    lap("trial edits")
    return Expansion(edit_set, rounds, _missing(premise, edit_set), seconds)


def _distinct(premise: Premise, items: Sequence[SetItem]) -> tuple[SetItem, ...]:
    """Return the first item of each prompt, and none of the request's own."""
    found: dict[Prompt, SetItem] = {}
    for item in items:
        if item.prompt != premise.request.prompt:
            found.setdefault(item.prompt, item)
    return tuple(found.values())


def _missing(premise: Premise, edit_set: EditSet) -> list[str]:
    """Return what could not be made, and what is doubtful about the request, in sentences."""
    missing = []
    if premise.old and premise.old.casefold() == premise.request.target.strip().casefold():
        missing.append("the model gives this answer already: there may be nothing to edit")
    elif premise.kind_missed is not None:
        missing.append(
            f"to the model its own answer, {premise.old!r}, is a {premise.kind_missed}, and the target is none: is "
            "that meant? Nothing is said to follow from it"
        )
    if not edit_set.of("phrasing"):
        missing.append(
            "no other way to ask was found: the model completes no common statement alike. Add some to the set (items "
            '"phrasing"), or name a --writer: other ways to ask are what carries an edit over'
        )
    if premise.statement is None:
        missing.append("the model's answer does not restate the question, so nothing was asked of other subjects")
    if not [item for item in edit_set.of("implication") if item.kind != "choice"]:
        missing.append("nothing is known to follow from this answer")
    return missing
