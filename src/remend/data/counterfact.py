"""CounterFact (Meng et al., 2022): false completions, with neighbours that share the true or the new object."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from remend.data.json_rows import Row, Skip, ignore, read_rows
from remend.data.parsing import alike, filled, is_edit, others, probe, request
from remend.request import EditRequest, Probe

FORM = (
    'ROME\'s {"case_id": …, "requested_rewrite": {"prompt": "… {} …", "subject": …, "relation_id": …, "target_new": '
    '{"str": …}, "target_true": {"str": …}}, "paraphrase_prompts": […], "neighborhood_prompts": […], '
    '"attribute_prompts": […], "generation_prompts": […]}, or flat: {"subject": …, "prompt": …, "target_new": …, '
    '"ground_truth": …, "rephrase_prompt": …, "locality_prompt": …, "locality_ground_truth": …}'
)


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests of a CounterFact file, as ROME published it or flattened.

    Neighbourhood prompts are near prompts of kind ``same_object``: they ask the same of other subjects whose true
    answer is the same. Attribute prompts are of kind ``same_target``: of other subjects the edit's new answer is true,
    and stays so. The flat form has one locality prompt; it is of kind ``same_object`` where its answer is the edited
    fact's true one (in the files we know, always), and a plain ``locality`` probe otherwise.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    for row in read_rows(path, FORM, skip):
        yield from _flat(row) if "prompt" in row.content else _nested(row)


def _nested(row: Row) -> Iterator[EditRequest]:
    rewrite = row.row("requested_rewrite")
    subject = rewrite.text("subject")
    prompt = filled(rewrite, "prompt", subject)
    target, truth = rewrite.row("target_new").answer("str"), rewrite.row("target_true").text("str").strip()
    near: list[Probe] = []
    for key, answer, kind in (
        ("neighborhood_prompts", truth, "same_object"),
        ("attribute_prompts", target, "same_target"),
    ):
        near += [found for text in row.texts(key) for found in probe(row, text, [answer], kind)]
    paraphrases, generation = row.texts("paraphrase_prompts"), row.texts("generation_prompts")
    if is_edit(row, target, [truth]):
        yield request(
            prompt,
            target,
            [truth],
            subject=subject,
            id=row.name("case_id"),
            relation=rewrite.name("relation_id"),
            paraphrases=others(row, prompt, paraphrases),
            near=tuple(near),
            generation=tuple(dict.fromkeys(generation)),
        )


def _flat(row: Row) -> Iterator[EditRequest]:
    prompt, target, truth = row.text("prompt"), row.answer("target_new"), row.text("ground_truth").strip()
    asked, answer = row.text("locality_prompt"), row.answer("locality_ground_truth")
    same = alike(answer) == alike(truth)
    kept = tuple(probe(row, asked, [answer], "same_object" if same else None))
    paraphrases = row.texts("rephrase_prompt")
    if is_edit(row, target, [truth]):
        yield request(
            prompt,
            target,
            [truth],
            subject=row.text("subject"),
            id=row.name("case_id"),
            relation=row.name("relation"),
            paraphrases=others(row, prompt, paraphrases),
            **{"near" if same else "locality": kept},
        )
