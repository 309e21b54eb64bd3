"""What a trial edit disturbs, out of a pool of prompts that should stay: hard negatives, in rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.data.edit_sets import EditSet, SetItem
from remend.edit import Edit
from remend.editors import Editor
from remend.editors.locate_then_edit.common_questions import frames, reference_subjects
from remend.editors.locate_then_edit.fit import FitConfig
from remend.expansion.implications import moved_questions
from remend.expansion.neighbours import SURE_FROM
from remend.expansion.premise import Premise, first_words
from remend.expansion.well_known import names_asked, suits
from remend.progress import report_progress
from remend.request import EditRequest
from remend.tasks.base import Example, Task, in_batches
from remend.tasks.endings import asks

ANSWER_TOKENS = 4
"""Tokens of an answer to a question that are compared; of a statement it is the next one."""

TRIAL_PHRASINGS = 3
"""Phrasings to which a trial edit is fitted."""

TRIAL_EDITS = FitConfig(steps=25, settle=0)
"""Settings of trial edits: they tell what is disturbed, and need not answer the last phrasing nor disturb the least."""


@dataclass(frozen=True)
class Round:
    """What one trial edit did to the pool.

    Attributes:
        pool: the number of prompts.
        disturbed: of how many the edit changed the answer.
        added: how many were added to the set.
    """

    pool: int
    disturbed: int
    added: int


def built_in_pool(premise: Premise) -> list[str]:
    """Return what is asked of the subject beside the request, of the target, and of other subjects, as texts."""
    asking = asks(premise.request.prompt)
    moved = moved_questions(premise)
    common = [frame for frame in frames("questions" if asking else "statements") if frame.question not in moved]
    names = reference_subjects() if asking else names_asked(premise.question, premise.kind)
    others = [name for name in names if name.casefold() not in premise.subject.casefold()]
    return [
        *(frame.about(premise.subject) for frame in common if suits(frame.question, premise.kind)),
        *(frame.about(premise.request.target) for frame in common if suits(frame.question, premise.target_kind)),
        *(premise.about(name) for name in others),
    ]


def mine(
    premise: Premise,
    editor: Editor,
    edit_set: EditSet,
    pool: Sequence[str],
    built_in: Sequence[str],
    rounds: int,
    most: int,
) -> tuple[EditSet, list[Round]]:
    """Add the prompts of a pool that a trial edit disturbs most, in rounds, until nothing new is disturbed.

    A prompt is disturbed if the edited model's choice is another one at a token of the unedited model's answer.
    Built-in prompts of whose answers the unedited model is not sure are left out: any change changes those.

    Args:
        premise: what is asked.
        editor: what makes the trial edits.
        edit_set: the set so far.
        pool: texts that should stay.
        built_in: others, of which those count of whose answers the model is sure.
        rounds: the most trial edits.
        most: the most prompts that are added in one round.

    Returns:
        The set, and what each round found.
    """
    task, own = premise.task, premise.request.prompt
    moving = {own, *(item.prompt for item in edit_set.items if item.item != "near")}
    texts = dict.fromkeys([*pool, *built_in])
    prompts = [prompt for text in texts if (prompt := premise.in_form(text)) not in moving]
    done: list[Round] = []
    if not prompts or not rounds:
        return edit_set, done
    answers = task.predict(prompts, ANSWER_TOKENS if asks(own) else 1)
    asked = [Example(tuple(task.encode_input(p)), a) for p, a in zip(prompts, answers, strict=True)]
    before = _log_probabilities(task, asked)
    given = {premise.in_form(text) for text in pool}
    counted = [i for i, prompt in enumerate(prompts) if prompt in given or _sure(before[i])]
    prompts, answers = [prompts[i] for i in counted], [answers[i] for i in counted]
    asked, before = [asked[i] for i in counted], [before[i] for i in counted]
    for number in range(1, rounds + 1):
        report_progress("trial edits", number - 1, rounds)
        edit = editor.edit(task, [_trial(premise, edit_set)])
        assert isinstance(edit, Edit)
        with edit.applied(task.model):
            after = _log_probabilities(task, asked)
        # KL(unedited ‖ edited) in nats, averaged over the tokens of the unedited model's answer.
        divergence = [float((b.exp() * (b - a)).sum(1).mean()) for b, a in zip(before, after, strict=True)]
        changed = [bool((b.argmax(1) != a.argmax(1)).any()) for b, a in zip(before, after, strict=True)]
        disturbed = [i for i, is_changed in enumerate(changed) if is_changed]
        known = {item.prompt for item in edit_set.items}
        new = sorted((i for i in disturbed if prompts[i] not in known), key=lambda i: -divergence[i])[:most]
        items = [
            SetItem(
                item="near",
                kind="mined",
                made=f"trial edit {number}: {divergence[i]:.2f} nats",
                prompt=prompts[i],
                answer=first_words(task.decode(answers[i])) or None,
            )
            for i in new
        ]
        done.append(Round(len(prompts), len(disturbed), len(items)))
        edit_set = EditSet(edit_set.request, (*edit_set.items, *items))
        if not items:
            break
    return edit_set, done


def _sure(answer: Float[Tensor, "target token"]) -> bool:
    """Tell whether a model is sure of an answer, of whose tokens these are the distributions, as logarithms."""
    return bool((answer.amax(1) >= math.log(SURE_FROM)).all())


def _trial(premise: Premise, edit_set: EditSet) -> EditRequest:
    """Return what a trial edit is made of: the request as the model would say it, some phrasings, and what must stay.

    What follows from the edit costs most, and moves no more than the edit itself does.
    """
    phrasings = edit_set.of("phrasing")[:TRIAL_PHRASINGS]
    return EditSet(premise.said, (*phrasings, *edit_set.of("near"))).as_request()


@torch.no_grad()
def _log_probabilities(task: Task, examples: Sequence[Example]) -> list[Float[Tensor, "target token"]]:
    """Return the distributions of each example's target tokens, as logarithms."""
    found: list[Tensor] = []
    with frozen(task.model):
        for part in in_batches(examples):
            batch = task.collate(part)
            logs = task.outputs(batch).float().log_softmax(-1).cpu()
            found += logs.split([len(example.target) for example in part])
    return found
