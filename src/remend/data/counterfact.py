"""CounterFact (Meng et al., 2022): false completions, with neighbors that share the true or the new object."""

from __future__ import annotations

from collections.abc import Iterator

from remend.data.json_rows import JsonRow, json_reader
from remend.data.knowedit import parse_portability
from remend.data.parsing import distinct_paraphrases, fill_template, is_edit, make_probes, make_request, normalize
from remend.request import EditRequest, Probe


@json_reader(
    'ROME\'s {"case_id": …, "requested_rewrite": {"prompt": "… {} …", "subject": …, "relation_id": …, "target_new": '
    '{"str": …}, "target_true": {"str": …}}, "paraphrase_prompts": […], "neighborhood_prompts": […], '
    '"attribute_prompts": […], "generation_prompts": […]}, or flat: {"subject": …, "relation": …, "prompt": …, '
    '"target_new": …, "ground_truth": …, "rephrase_prompt": …, "locality_prompt": …, "locality_ground_truth": …, '
    '"portability": …}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield the requests of a CounterFact file, as ROME published it or flattened.

    Neighborhood prompts are near prompts of kind ``same_object``: they ask the same of other subjects whose true
    answer is the same. Attribute prompts are of kind ``same_target``: of other subjects the edit's new answer is true,
    and stays so. The flat form has one locality prompt; it is of kind ``same_object`` where its answer is the edited
    fact's true one (in the files we know, always), and a plain ``locality`` probe otherwise.
    """
    for row in rows:
        # Only the flat form has its prompt at the top; told row by row, since a file may mix both.
        yield from _parse_flat(row) if "prompt" in row.content else _parse_nested(row)


def _parse_nested(row: JsonRow) -> Iterator[EditRequest]:
    rewrite = row.row("requested_rewrite")
    subject = rewrite.text("subject")
    prompt = fill_template(rewrite, "prompt", subject)
    target = rewrite.row("target_new").answer("str")
    truth = rewrite.row("target_true").answer("str") if rewrite.has("target_true") else ""
    near: list[Probe] = []
    for key, answer, kind in (
        ("neighborhood_prompts", truth, "same_object"),
        ("attribute_prompts", target, "same_target"),
    ):
        near += [probe for text in row.texts_if_any(key) for probe in make_probes(row, text, [answer], kind)]
    paraphrases, generation = row.texts_if_any("paraphrase_prompts"), row.texts_if_any("generation_prompts")
    if is_edit(row, target, [truth]):
        yield make_request(
            prompt,
            target,
            [truth],
            subject=subject,
            id=row.name("case_id"),
            relation=rewrite.name("relation_id"),
            paraphrases=distinct_paraphrases(row, prompt, paraphrases),
            near=tuple(near),
            # Some rows list the same prompt several times.
            generation=tuple(dict.fromkeys(generation)),
        )


def _parse_flat(row: JsonRow) -> Iterator[EditRequest]:
    prompt, target, truth = row.text("prompt"), row.answer("target_new"), row.text_if_any("ground_truth") or ""
    locality_prompt = row.text_if_any("locality_prompt")
    locality_answer = row.answer("locality_ground_truth") if locality_prompt else ""
    same_object = bool(truth) and normalize(locality_answer) == normalize(truth)
    kind = "same_object" if same_object else None
    probes = make_probes(row, locality_prompt, [locality_answer], kind) if locality_prompt else []
    paraphrases, portability = row.texts_if_any("rephrase_prompt"), parse_portability(row)
    if is_edit(row, target, [truth]):
        yield make_request(
            prompt,
            target,
            [truth],
            subject=row.text_if_any("subject"),
            id=row.name("case_id"),
            relation=row.name("relation"),
            paraphrases=distinct_paraphrases(row, prompt, paraphrases),
            portability=tuple(portability),
            **{"near" if same_object else "locality": tuple(probes)},
        )
