"""Other ways to ask what a request asks."""

from __future__ import annotations

from collections.abc import Iterator

from remend.data.edit_sets import SetItem
from remend.data.question_rewrites import rewrites
from remend.editors.locate_then_edit.common_questions import statements_of, text_of
from remend.expansion.premise import Premise
from remend.tasks.endings import asks

SURE = {"syntax": 0.97, "family": 0.95, "frame": 1.0}
"""How sure rewrites by rules are: the shares of those that a person judged (``benchmarks/judge_phrasings.py``), with
one right and one wrong added."""


def phrasings(premise: Premise, most: int) -> Iterator[SetItem]:
    """Yield other ways to ask: of a question, rewrites by rules; of a statement, those of the same common question.

    Args:
        premise: what is asked.
        most: the most phrasings.
    """
    if not asks(premise.request.prompt):
        texts = [text.replace("{}", premise.subject) for text in statements_of(premise.question)]
        for text in [text for text in texts if text != premise.request.prompt][:most]:
            yield SetItem(
                item="phrasing",
                kind="statement",
                made=f"family: {premise.question}",
                sure=SURE["family"],
                prompt=text,
            )
        return
    chosen = premise.questions.choose(premise.task, premise.said, most)
    sources = {
        rewrite.about(premise.subject): rewrite for rewrite in rewrites(text_of(premise.request), premise.subject, most)
    }
    for text in chosen.phrasings:
        rewrite = sources.get(text)
        by_rule = "" if rewrite is None or rewrite.source == "frame" else f": {rewrite.rule}"
        yield SetItem(
            item="phrasing",
            kind="question",
            made="family" if rewrite is None else f"{rewrite.source}{by_rule}",
            sure=SURE["family" if rewrite is None else rewrite.source],
            prompt=premise.in_form(text),
        )
