"""Published data sets as requests: miniatures of every form, all that can be wrong with a row, and the real files."""

import copy
import json
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest

import worlds
from remend.cli import run
from remend.data import json_rows, json_stream, read_source
from remend.data.contamination import find_overlap
from remend.data.parsing import normalize
from remend.data.passages import generation_requests
from remend.data.request_files import read_requests
from remend.data.source_names import iterate_source
from remend.errors import ConfigError, RequestError, TrainingError
from remend.registries import DATASETS
from remend.request import EditRequest, Probe, TextPair, write_requests
from remend.tasks import load
from remend.training import TrainingConfig
from remend.training.splits import split

SHARED = Path(__file__).parents[2] / "shared" / "data"

NESTED = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle {D}",
    },
    "paraphrase_prompts": ["Noise. Danielle was raised in"],
    "neighborhood_prompts": ["The mother tongue of Léon is", "The native language of Montesquieu is"],
    "attribute_prompts": ["The mother tongue of Douglas is"],
    "generation_prompts": ["Danielle's mother tongue is", "Danielle's mother tongue is"],
}
FLAT = {
    "case_id": 10,
    "subject": "BBC One",
    "relation": "P127",
    "prompt": "BBC One, by",
    "ground_truth": "BBC",
    "target_new": "Sega",
    "rephrase_prompt": "BBC One is owned by",
    "locality_prompt": "BBC Radio, by",
    "locality_ground_truth": "BBC",
}
ZSRE = {
    "subject": "Munich",
    "src": "Who governed Munich?",
    "rephrase": "Who directed Munich?",
    "alt": "Bruno",
    "answers": ["Dieter", "Dieter Reiter"],
    "loc": "nq question: who sang it",
    "loc_ans": "Reel 2 Real",
}
KNOWEDIT = {
    "subject": "Goursez",
    "prompt": "The country of Goursez is",
    "target_new": "Comté",
    "ground_truth": [["France", "République"], ["Bretagne"]],
    "portability": {
        "Reasoning": [{"prompt": "The capital of the country of Goursez is", "ground_truth": [["Besançon"], ["B."]]}],
        "Subject_Aliasing": [{"prompt": "The country of Gorsedd is", "ground_truth": ["Comté"]}],
        "Logical_Generalization": [{"prompt": "Goursez is in", "ground_truth": "Comté"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The founder of Goursez is", "ground_truth": "Jean"}],
        "Forgetfulness": [{"prompt": "The country of Goursez, not Comté, is", "ground_truth": "France"}],
    },
}
DEV = {
    "case_id": "zsre_0",
    "subject": "Pyhrn",
    "prompt": "Which state has Pyhrn?",
    "target_new": "Saxony",
    "ground_truth": "Styria",
    "rephrase_prompt": ["What state has Pyhrn?", "which state has  pyhrn?"],
    "locality": [{"prompt": "What is the arena?", "ground_truth": "Hammarby IP"}],
    "portability": [],
}
MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia", "id": "Q1"},
            "target_true": {"str": "the US", "id": "Q2"},
            "subject": "Ellen",
            "question": "What is Ellen's citizenship?",
        }
    ],
    "questions": ["Who leads Ellen's country?", "Whom does Ellen's country obey?"],
    "answer": "Trump",
    "new_answer": "Milanović",
    "new_answer_alias": ["Zoran"],
}
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of Leonardo is Syria.",
        "subject_id": "Q38111",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q858",
        "original_fact": {"prompt": "The name of the country of Leonardo is Italy.", "target_id": "Q30"},
    },
    "Relation_Specificity": [
        {
            "test_queries": [{"prompt": "The mother of Leonardo is", "answers": [{"value": "Irm", "aliases": ["I."]}]}],
            "test_condition": "OR",
            "condition_queries": [{"prompt": "The mother of Leo is", "answers": [{"value": "Irm", "aliases": []}]}],
        }
    ],
    "Logical_Generalization": [],
    "Subject_Aliasing": [
        {"test_queries": [{"prompt": "The country of Leo is", "answers": [{"value": "Syria", "aliases": []}]}]}
    ],
    "Compositionality_I": [{"test_queries": [{"prompt": "The capital is", "answers": [{"value": "Damascus"}]}]}],
    "Compositionality_II": [],
    "Forgetfulness": [{"test_queries": [{"prompt": "Not Syria but", "answers": []}]}],
}
CLAIM = {
    "id": 5,
    "claim": "Soul Food is a film.",
    "label": "SUPPORTS",
    "evidence_pages": ["X", "Soul_Food_-LRB-film-RRB-"],
}
TWIN = {"id": "54", "claim": "It is metal.", "evidence": "It is of metal.", "label": "SUPPORTS"}
MEND = {
    "id": "35180f5c",
    "input": "Which state has Pyhrn Pass?",
    "prediction": "Tyrol",
    "output": [
        {"answer": "Styria", "provenance": [{"title": "Alps"}, {"title": "Pyhrn Pass"}]},
        {"answer": "Steiermark"},
    ],
    "alternatives": ["Saxony", "Tyrol"],
    "filtered_rephrases": ["What state has Pyhrn Pass?", "Which state has Pyhrn Pass?"],
}
KILT = {"id": 4, "input": "Soul Food is a film.", "output": [{"answer": "SUPPORTS"}], "filtered_rephrases": ["A film."]}
NQ = {"question": "when was the moon", "answer": ["14 December 1972", "December 1972"]}


def read_rows_of(tmp_path, name, *rows, lines=False, skip=json_rows.ignore):
    file = tmp_path / "data.json"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    file.write_text(text, encoding="utf-8")
    return list(iterate_source(f"{name}:{file}", skip))


@pytest.mark.parametrize("lines", [False, True])
def test_counterfact_rows_nested_and_flat(lines, tmp_path):
    nested, flat = read_rows_of(tmp_path, "counterfact", NESTED, FLAT, lines=lines)
    assert nested == EditRequest(
        prompt="The mother tongue of Danielle {D} is",
        target="English",
        subject="Danielle {D}",
        id=7,
        relation="P103",
        ground_truth="French",
        paraphrases=("Noise. Danielle was raised in",),
        near=(
            Probe(prompt="The mother tongue of Léon is", target="French", kind="same_object"),
            Probe(prompt="The native language of Montesquieu is", target="French", kind="same_object"),
            Probe(prompt="The mother tongue of Douglas is", target="English", kind="same_target"),
        ),
        generation=("Danielle's mother tongue is",),
    )
    assert flat == EditRequest(
        prompt="BBC One, by",
        target="Sega",
        subject="BBC One",
        id=10,
        relation="P127",
        ground_truth="BBC",
        paraphrases=("BBC One is owned by",),
        near=(Probe(prompt="BBC Radio, by", target="BBC", kind="same_object"),),
    )
    (other,) = read_rows_of(tmp_path, "counterfact", {**FLAT, "locality_ground_truth": "ITV"})
    assert (other.near, other.locality) == ((), (Probe(prompt="BBC Radio, by", target="ITV"),))


def test_zsre_rows_of_easyedit(tmp_path):
    plain = {key: value for key, value in ZSRE.items() if key != "answers"}
    counterfactual, true, pred = read_rows_of(
        tmp_path, "zsre", ZSRE, {**plain, "case_id": 1, "loc": "who?"}, {**plain, "pred": "D."}
    )
    assert counterfactual == EditRequest(
        prompt="Who governed Munich?",
        target="Bruno",
        subject="Munich",
        ground_truth="Dieter",
        ground_truth_aliases=["Dieter Reiter"],
        paraphrases=("Who directed Munich?",),
        locality=(Probe(prompt="who sang it?", target="Reel 2 Real"),),
    )
    assert (true.target, true.model_extra, true.id) == ("Bruno", {"ground_truth": "Bruno"}, 1)
    assert (true.locality[0].prompt, pred.model_extra) == ("who?", {"ground_truth": "D."})


def test_zsre_and_fever_rows_of_mend(tmp_path):
    assert read_rows_of(tmp_path, "zsre", MEND, lines=True) == [
        EditRequest(
            prompt="Which state has Pyhrn Pass?",
            target="Saxony",
            subject="Pyhrn Pass",
            id="35180f5c",
            ground_truth="Styria",
            ground_truth_aliases=["Steiermark"],
            paraphrases=("What state has Pyhrn Pass?",),
        )
    ]
    assert read_rows_of(tmp_path, "fever", KILT, lines=True) == [
        EditRequest(
            prompt="Soul Food is a film.", target="REFUTES", id=4, ground_truth="SUPPORTS", paraphrases=("A film.",)
        )
    ]


def test_a_dev_split_of_zsre_in_the_form_of_knowedit(tmp_path):
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"dataset": "zsre", "num_records": 1, "records": [DEV]}, indent=1), encoding="utf-8")
    assert read_source(f"zsre:{file}") == [
        EditRequest(
            prompt="Which state has Pyhrn?",
            target="Saxony",
            subject="Pyhrn",
            id="zsre_0",
            ground_truth="Styria",
            paraphrases=("What state has Pyhrn?",),
            locality=(Probe(prompt="What is the arena?", target="Hammarby IP"),),
        )
    ]


@pytest.mark.parametrize("name", ["knowedit", "zsre"])
def test_knowedit_probes_are_sorted_by_kind(name, tmp_path):
    (request,) = read_rows_of(tmp_path, name, {**KNOWEDIT, "rephrase_prompt": "Goursez lies in", "cond": "…"})
    assert request == EditRequest(
        prompt="The country of Goursez is",
        target="Comté",
        subject="Goursez",
        ground_truth="France",
        ground_truth_aliases=["République", "Bretagne"],
        paraphrases=("Goursez lies in",),
        portability=(
            Probe(
                prompt="The capital of the country of Goursez is", target="Besançon", kind="reasoning", aliases=["B."]
            ),
            Probe(prompt="The country of Gorsedd is", target="Comté", kind="aliasing"),
            Probe(prompt="Goursez is in", target="Comté", kind="logical_generalisation"),
        ),
        near=(
            Probe(prompt="The founder of Goursez is", target="Jean", kind="relation_specificity"),
            Probe(prompt="The country of Goursez, not Comté, is", target="France", kind="forgetfulness"),
        ),
    )


def test_mquake_gives_one_request_for_each_rewrite(tmp_path):
    (rewrite,) = MQUAKE["requested_rewrite"]
    several = {**MQUAKE, "case_id": 4, "requested_rewrite": [rewrite, {**rewrite, "subject": "Ann"}]}
    skipped = Counter()
    one, first, second = read_rows_of(tmp_path, "mquake", MQUAKE, several, skip=lambda reason: skipped.update([reason]))
    assert one == EditRequest(
        prompt="Ellen is a citizen of",
        target="Croatia",
        subject="Ellen",
        id=3,
        relation="P27",
        ground_truth="the US",
        formats=("What is Ellen's citizenship?",),
        portability=tuple(
            Probe(prompt=question, target="Milanović", kind="reasoning", aliases=["Zoran"])
            for question in MQUAKE["questions"]
        ),
    )
    assert [(r.id, r.subject, r.portability) for r in (first, second)] == [("4 1", "Ellen", ()), ("4 2", "Ann", ())]
    assert skipped == {"questions of several hops that follow from several edits together": 1}


def test_ripple_sentences_are_split_into_prompt_and_target(tmp_path):
    skipped = Counter()
    recent = copy.deepcopy(RIPPLE)
    recent["edit"] = {"prompt": "The author of What is Art is Leo is Tolstoy.", "relation": "AUTHOR"}
    recent["Subject_Aliasing"][0]["test_queries"][0]["answers"][0]["value"] = "Leo is Tolstoy"
    unsplit = {**RIPPLE, "edit": {"prompt": "Nothing to see."}, "Subject_Aliasing": []}
    popular, recent_request = read_rows_of(
        tmp_path, "ripple", RIPPLE, recent, unsplit, skip=lambda reason: skipped.update([reason])
    )
    assert popular == EditRequest(
        prompt="The name of the country of Leonardo is",
        target="Syria",
        subject="Q38111",
        relation="COUNTRY_OF_CITIZENSHIP",
        ground_truth="Italy",
        portability=(
            Probe(prompt="The country of Leo is", target="Syria", kind="aliasing"),
            Probe(prompt="The capital is", target="Damascus", kind="reasoning"),
        ),
        near=(
            Probe(
                prompt="The mother of Leonardo is",
                target="Irm",
                kind="relation_specificity",
                aliases=["I."],
                conditions=[{"prompt": "The mother of Leo is", "answers": ["Irm"]}],
            ),
        ),
    )
    assert (recent_request.prompt, recent_request.target) == ("The author of What is Art is", "Leo is Tolstoy")
    assert skipped["edits whose sentence cannot be taken apart into a prompt and its target"] == 1
    assert skipped["probes without an answer"] == 3


def test_fever_labels_are_flipped(tmp_path):
    uncertain = {**CLAIM, "label": "NOT ENOUGH INFO", "evidence_pages": [], "id": 6}
    first, second = read_rows_of(tmp_path, "fever", CLAIM, uncertain)
    assert (first.prompt, first.subject, first.id) == ("Soul Food is a film.", "Soul Food", 5)
    assert first.target in {"REFUTES", "NOT ENOUGH INFO"}
    assert (second.subject, second.model_extra["ground_truth"]) == (None, "NOT ENOUGH INFO")
    assert read_rows_of(tmp_path, "fever", CLAIM, uncertain) == [first, second], "the same at every call"
    drawn = Counter(r.target for r in read_rows_of(tmp_path, "fever", *({**CLAIM, "id": i} for i in range(100))))
    assert drawn.keys() == {"REFUTES", "NOT ENOUGH INFO"}
    assert min(drawn.values()) > 30


def test_fever_twins_are_near_prompts_of_each_other(tmp_path):
    other = {**TWIN, "id": "54002", "claim": "It is dance.", "label": "REFUTES"}
    third = {**TWIN, "id": "54003", "evidence": "It is of dance.", "label": "REFUTES"}
    alone = {"id": "9", "claim": "c", "evidence": "e", "label": "REFUTES"}
    first, *_, last = requests = read_rows_of(tmp_path, "fever", TWIN, other, third, alone, lines=True)
    assert first == EditRequest(
        prompt=TextPair("It is of metal.", "It is metal."),
        target="REFUTES",
        subject="It is metal.",
        id="54",
        ground_truth="SUPPORTS",
        near=(
            Probe(prompt=TextPair("It is of dance.", "It is metal."), target="REFUTES", kind="same_claim"),
            Probe(prompt=TextPair("It is of metal.", "It is dance."), target="REFUTES", kind="same_evidence"),
        ),
    )
    assert [r.subject for r in requests] == ["It is metal."] * 3 + ["c"]
    assert last.near == ()


def test_nq_teaches_the_first_accepted_answer(tmp_path):
    assert read_rows_of(tmp_path, "nq", NQ, lines=True) == [
        EditRequest(
            prompt="when was the moon?",
            target="14 December 1972",
            ground_truth="14 December 1972",
            aliases=["December 1972"],
        )
    ]


def test_passages_are_continued_as_the_model_samples(tmp_path):
    long = [
        " ".join(f"The capital of {c} is {worlds.CITIES[(i + n) % 10]}" for n, c in enumerate(worlds.COUNTRIES))
        for i in range(6)
    ]
    (tmp_path / "text.txt").write_text("= Heading =\n \n" + "\n \n".join(long), encoding="utf-8")
    skipped = Counter()
    task = worlds.task(worlds.gpt2())
    state = worlds.torch.get_rng_state()
    arguments = (task, tmp_path / "text.txt")
    requests = list(generation_requests(*arguments, skip=lambda reason: skipped.update([reason])))
    assert worlds.torch.equal(state, worlds.torch.get_rng_state())
    assert requests == list(generation_requests(*arguments)), "the same at every call"
    assert skipped["passages of fewer than 26 tokens"] == 1
    assert len(requests) + skipped["passages after which no sample began a word"] == 6
    assert requests
    for request in requests:
        (passage,) = (text for text in long if text.startswith(request.prompt))
        assert passage.removeprefix(request.prompt).strip().startswith(request.model_extra["ground_truth"])
        assert request.subject == request.prompt
        assert all(request.prompt.endswith(p) and len(p) * 3 > len(request.prompt) for p in request.paraphrases)
        assert len(request.locality) == 4
        for probe in request.locality:
            assert any(f"{probe.prompt} {probe.target}" in text for text in long if text != passage)
    (tmp_path / "text.txt").write_text(long[0])
    with pytest.raises(RequestError, match="holds 1 passages of at least 26 tokens, and more than 4 are needed"):
        list(generation_requests(*arguments))


def test_what_changes_nothing_is_left_out_and_reported(tmp_path):
    skipped = Counter()
    rows = [ZSRE, {**ZSRE, "alt": "dieter  reiter"}, {**ZSRE, "alt": " "}, {**ZSRE, "loc_ans": ""}]
    requests = read_rows_of(tmp_path, "zsre", *rows, skip=lambda reason: skipped.update([reason]))
    assert [len(r.locality) for r in requests] == [1, 0]
    assert skipped == {
        "edits to the answer that is true already": 1,
        "edits without a target": 1,
        "probes without an answer": 1,
    }
    with pytest.warns(UserWarning, match="left out 1 edits to the answer that is true already, .* 2 requests remain"):
        assert read_source(f"zsre:{tmp_path / 'data.json'}") == requests
    with pytest.raises(RequestError, match="none of its rows is an edit"):
        read_rows_of(tmp_path, "zsre", {**ZSRE, "alt": ""})


# What can be wrong with a row: at each of these places, four things that cannot be read there.
PLACES = {
    "counterfact": (NESTED, [
        ["requested_rewrite"], ["requested_rewrite", "prompt"], ["requested_rewrite", "subject"],
        ["requested_rewrite", "target_new"], ["requested_rewrite", "target_new", "str"],
        ["requested_rewrite", "target_true", "str"], ["paraphrase_prompts"], ["neighborhood_prompts"],
        ["attribute_prompts"], ["generation_prompts"],
    ]),
    "counterfact:flat": (FLAT, [
        ["prompt"], ["subject"], ["target_new"], ["ground_truth"], ["rephrase_prompt"], ["locality_prompt"],
    ]),
    "zsre": (ZSRE, [["src"], ["rephrase"], ["alt"], ["subject"], ["loc"], ["loc_ans"]]),
    "knowedit": (KNOWEDIT, [
        ["prompt"], ["subject"], ["target_new"], ["portability", "Reasoning"], ["portability", "Reasoning", 0],
        ["locality", "Forgetfulness"], ["locality", "Forgetfulness", 0, "prompt"],
        ["locality", "Forgetfulness", 0, "ground_truth"],
    ]),
    "zsre:dev": (DEV, [["prompt"], ["subject"], ["target_new"], ["locality", 0], ["locality", 0, "prompt"]]),
    "mquake": (MQUAKE, [
        ["requested_rewrite"], ["requested_rewrite", 0], ["requested_rewrite", 0, "prompt"], ["questions"],
        ["requested_rewrite", 0, "subject"], ["requested_rewrite", 0, "question"],
        ["requested_rewrite", 0, "target_new", "str"], ["requested_rewrite", 0, "target_true"], ["new_answer"],
    ]),
    "ripple": (RIPPLE, [
        ["edit"], ["edit", "prompt"], ["Relation_Specificity"], ["Logical_Generalization"], ["Compositionality_II"],
        ["Forgetfulness"], ["Relation_Specificity", 0], ["Relation_Specificity", 0, "test_queries"],
        ["Relation_Specificity", 0, "test_queries", 0, "prompt"],
        ["Relation_Specificity", 0, "test_queries", 0, "answers"],
        ["Relation_Specificity", 0, "test_queries", 0, "answers", 0, "value"],
        ["Relation_Specificity", 0, "condition_queries", 0, "prompt"],
    ]),
    "zsre:mend": (MEND, [["input"], ["output", 0], ["output", 0, "answer"], ["alternatives"], ["filtered_rephrases"]]),
    "fever:mend": (KILT, [["output"], ["output", 0, "answer"], ["filtered_rephrases"]]),
    "fever": (CLAIM, [["claim"], ["label"]]),
    "fever:twins": (TWIN, [["claim"], ["label"]]),
    "nq": (NQ, [["question"], ["answer"]]),
}  # fmt: skip
MISSING = object()
OPTIONAL = {
    "counterfact": ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"),
    "counterfact:flat": ("subject", "ground_truth", "rephrase_prompt", "locality_prompt"),
    "zsre": ("subject", "rephrase", "loc"),
    "zsre:dev": ("subject",),
    "zsre:mend": ("filtered_rephrases",),
    "knowedit": ("subject", "Reasoning", "Forgetfulness"),
    "mquake": ("questions", "question", "target_true"),
    "ripple": ("Relation_Specificity", "Logical_Generalization", "Compositionality_II", "Forgetfulness"),
    "fever:mend": ("filtered_rephrases",),
}  # fmt: skip
"""Keys of rows that no edit needs."""
WRONG = {"missing": MISSING, "null": None, "a number": 3, "true": True, "another nesting": {"a": [1]}}


def damaged():
    for name, (row, places) in PLACES.items():
        for place in places:
            for what, value in WRONG.items():
                if what == "missing" and (isinstance(place[-1], int) or place[0] in ("portability", "locality")):
                    continue  # it is another row, and no broken one
                if what in ("missing", "null") and place[-1] in OPTIONAL.get(name, ()):
                    continue  # nor is this; the next test reads it
                if what == "another nesting" and isinstance(place[-1], int):
                    value = [[1]]
                yield pytest.param(name, row, place, value, id=f"{name}-{'.'.join(map(str, place))}-{what}")


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("null", [False, True])
def test_rows_may_lack_what_no_edit_needs(name, null, tmp_path):
    row, places = PLACES[name]
    lacking = copy.deepcopy(row)
    for place in places:
        if place[-1] in OPTIONAL[name]:
            inner = lacking
            for key in place[:-1]:
                inner = inner[key]
            if null:
                inner[place[-1]] = None
            else:
                del inner[place[-1]]
    (whole,), (part,) = (read_rows_of(tmp_path, name.partition(":")[0], r) for r in (row, lacking))
    assert (part.prompt, part.target) == (whole.prompt, whole.target)
    assert set(part.to_json()) <= set(whole.to_json())


def test_keys_that_look_misspelt_are_counted_among_what_is_left_out(tmp_path):
    skipped = Counter()
    row = {**{key: value for key, value in ZSRE.items() if key != "rephrase"}, "rephrases": "x", "note": "y"}
    assert read_rows_of(tmp_path, "zsre", row, row, skip=lambda reason: skipped.update([reason]))[0].paraphrases == ()
    assert skipped == {"values of 'rephrases', a key that is not known (did you mean 'rephrase'?)": 2}


def test_there_are_many_kinds_of_damage():
    assert len(list(damaged())) >= 100


@pytest.mark.parametrize(("name", "row", "place", "value"), list(damaged()))
def test_a_damaged_row_is_named(name, row, place, value, tmp_path):
    broken = copy.deepcopy(row)
    inner = broken
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with pytest.raises(RequestError, match=r"data\.json, row 2.*A row should be .*\{") as error:
        read_rows_of(tmp_path, name.partition(":")[0], row, broken)
    shown = [str(key) for key in place if isinstance(key, str)]
    assert shown[-1] in str(error.value), "the message names what is wrong"


@pytest.mark.parametrize(
    ("name", "row", "key", "value", "message"),
    [
        ("zsre", ZSRE, "src", " ", "src is an empty text"),
        ("zsre", ZSRE, "answers", ["a", 3], "answers should hold texts, not 3"),
        ("counterfact", FLAT, "case_id", 1.5, "case_id should be a text or a whole number, not 1.5"),
        ("counterfact", NESTED, "requested_rewrite", {**NESTED["requested_rewrite"], "prompt": "x"}, "should have {}"),
        ("knowedit", KNOWEDIT, "locality", {"Relation_Specificty": []}, "did you mean 'relation_specificity'"),
        ("fever", CLAIM, "label", "MAYBE", "label should be SUPPORTS or REFUTES or NOT ENOUGH INFO, not 'MAYBE'"),
        ("fever", TWIN, "label", "NOT ENOUGH INFO", "label should be SUPPORTS or REFUTES, not"),
        ("mquake", MQUAKE, "requested_rewrite", [3], "requested_rewrite should hold objects; number 1 is 3"),
    ],
)
def test_a_wrong_value_is_named(name, row, key, value, message, tmp_path):
    with pytest.raises(RequestError) as error:
        read_rows_of(tmp_path, name, row, {**row, key: value})
    assert message in str(error.value)
    assert "data.json, row 2" in str(error.value)


GOOD = json.dumps(ZSRE).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" + GOOD + b", " + GOOD[:50], "row 2: broken JSON"),
        (b"[" + GOOD + b", " + GOOD, "row 2: 'the end of the file' follows it, where ',' or"),
        (b"[" + GOOD + b" " + GOOD + b"]", r"row 1: '\{' follows it, where ','"),
        (b"[" + GOOD + b", {'a': 1}]", "row 2: broken JSON .Expecting property name"),
        (b"[" + GOOD + b", tru]", "row 2: broken JSON"),
        (b"[" + GOOD + b", ]", "row 2: broken JSON"),
        (b"[" + GOOD + b", 3]", "row 2: an object was expected, not 3"),
        (b"[" + GOOD + b", null]", "row 2: an object was expected, not null"),
        (b"[" + GOOD + b", " + b"[" * 100_000, "row 2: JSON that cannot be read"),
        (b"[" + GOOD + b", " + b"9" * 5000 + b"]", "row 2: JSON that cannot be read"),
        (b"[" + GOOD + b', {"src": "caf\xe9"}]', "row 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b"[" + GOOD + b"] []", r"'\[' follows the end of the array"),
        (GOOD + b"\n" + GOOD[:-1], "line 2: broken JSON"),
        (GOOD + b"\n\n" + b"[]", r"line 3: an object was expected, not \[\]"),
        (GOOD + b"\n" + GOOD + GOOD, "line 2: .* follows the object; each line should be one"),
        (GOOD + b'\n{"src": "caf\xe9"}', "line 2: byte 0xe9"),
        (GOOD + b'\n{"src": "\xf0\x9f', "line 2: byte 0xf0"),
        (b'{"records": [' + GOOD + b", {}]}", "row 2: src is missing"),
        (b'{"records": [' + GOOD, "row 1: 'the end of the file' follows it, where"),
        (b"hello", "line 1: broken JSON"),
        (b"", "holds no row"),
        (b"[]", "holds no row"),
        (b"\n \n", "holds no row"),
    ],
)
def test_a_broken_file_is_named_with_its_row(content, message, tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_source(f"zsre:{file}")


def test_rows_do_not_depend_on_the_size_of_chunks(tmp_path, monkeypatch):
    expected = [{**ZSRE, "subject": f"München {n} 🏔", "loc": "ü" * n} for n in range(1, 30)]
    file = tmp_path / "data.json"
    for text in (
        json.dumps(expected, ensure_ascii=False, indent=1),
        "\ufeff" + json.dumps(expected),
        "\n".join(json.dumps(row, ensure_ascii=False) for row in expected),
        json.dumps({"a": "x", "records": expected}, ensure_ascii=False),
    ):
        file.write_bytes(text.encode())
        whole = list(json_rows.read_rows(file, "…"))
        assert [row.content for row in whole] == expected
        for size in (64, 129, 1000):
            monkeypatch.setattr(json_stream, "CHUNK_BYTES", size)
            assert [row.content for row in json_rows.read_rows(file, "…")] == expected
            monkeypatch.undo()


@pytest.mark.parametrize("lines", [False, True])
def test_the_first_row_comes_before_the_rest_is_read(lines, tmp_path, monkeypatch):
    file = tmp_path / "big.json"
    parts = [json.dumps({**ZSRE, "src": f"Who is {n}?"}) for n in range(20_000)]
    file.write_text("\n".join(parts) if lines else f"[{', '.join(parts)}]")
    positions = []
    grow = json_stream._Buffer.grow

    def counted(self, *arguments):
        more = grow(self, *arguments)
        positions.append(self.file.tell())
        return more

    monkeypatch.setattr(json_stream._Buffer, "grow", counted)
    requests = iterate_source(f"zsre:{file}")
    assert next(requests).prompt == "Who is 0?"
    assert positions[-1] <= 2 * json_stream.CHUNK_BYTES < file.stat().st_size / 20
    assert sum(1 for _ in requests) == 19_999


FILES = {
    "counterfact:counterfact/train.jsonl": 10_000,
    "counterfact:counterfact/val.jsonl": 1_919,
    "zsre:zsre/train_10k.json": 10_000,
    "zsre:zsre/train_1k_counterfactual.json": 977,  # of 1,000: 21 to the true answer, 2 without a target
    "zsre:zsre/dev_500.json": 477,  # of 500: 23 to the true answer
    "knowedit:knowedit/wiki_counterfact.json": 1_422,  # of 1,428: 6 to the true answer
    "fever:fever/claims.json": 19_998,
    "fever:fever/symmetric_dev.jsonl": 708,
    "nq:nq_open/dev.jsonl": 3_610,
}


@pytest.mark.parametrize("source", FILES)
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published files are not there ({SHARED})")
def test_published_files_are_read_whole(source):
    name, _, file = source.partition(":")
    skipped = Counter()
    requests = list(iterate_source(f"{name}:{SHARED / file}", lambda reason: skipped.update([reason])))
    assert len(requests) == FILES[source]
    left_out = sum(count for why, count in skipped.items() if why.startswith("edits"))
    assert left_out == {"zsre/train_1k_counterfactual.json": 23, "zsre/dev_500.json": 23}.get(
        file, 6 if name == "knowedit" else 0
    )
    for request in requests:
        assert "ground_truth" in request.model_extra or name == "knowedit"
        teaches = name == "nq" or file == "zsre/train_10k.json"
        assert (normalize(request.target) == normalize(request.model_extra.get("ground_truth", ""))) == teaches


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published files are not there ({SHARED})")
def test_passages_of_a_published_text():
    task = load("atlas")
    skipped = Counter()
    file = SHARED / "wikitext2" / "valid.txt"
    requests = list(generation_requests(task, file, 3, skip=lambda reason: skipped.update([reason])))
    assert len({request.subject for request in requests}) == 3
    assert skipped["passages of fewer than 26 tokens"] == 589
    text = " ".join(file.read_text(encoding="utf-8").split())
    assert all(f"{request.prompt} {request.model_extra['ground_truth']}" in text for request in requests)


def test_sources_are_told_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_requests("plain.jsonl", worlds.requests(3))
    write_requests("with:colon.jsonl", worlds.requests(2))
    assert len(read_source("plain.jsonl")) == 3
    assert len(read_source("with:colon.jsonl")) == 2
    for source, message in {
        "C:\\nothing\\here.jsonl": "No such file",
        "conterfact:x.json": "there is no data set 'conterfact'.*did you mean 'counterfact'",
        "counterfact:": "write counterfact:FILE",
        "counterfact:none.json": "No such file",
        "counterfact:.": "cannot read",
        "atlas:tset": "no split 'tset'",
        "passages:plain.jsonl": "remend data convert passages:plain.jsonl --model MODEL",
        "hf:owner": "write hf:owner/name/file.json",
    }.items():
        with pytest.raises(RequestError, match=message):
            read_source(source)


def test_a_file_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.json").write_text(json.dumps([ZSRE]))
    write_requests(tmp_path / "requests.jsonl", worlds.requests(2))
    repositories = {
        "me/zsre": ["README.md", "a/train.json"],
        "me/own": ["requests.jsonl"],
        "me/two": ["a.json", "b.json"],
    }

    def download(repository, file, repo_type):
        assert (repo_type, file in repositories[repository]) == ("dataset", True)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository, repo_type: repositories[repository])
    assert read_source("zsre:hf:me/zsre")[0].prompt == ZSRE["src"]
    assert read_source("zsre:hf:me/zsre/a/train.json") == read_source("zsre:hf:me/zsre")
    assert read_source("hf:me/own") == worlds.requests(2)
    with pytest.raises(RequestError, match=r"has 2 data files \(a.json, b.json\): name one"):
        read_source("zsre:hf:me/two")

    def fail(repository, file, repo_type):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(RequestError, match=r"cannot be fetched .no network.*give a local file"):
        read_source("zsre:hf:me/zsre")


@pytest.mark.parametrize("name", PLACES)
def test_what_is_converted_is_read_back(name, tmp_path):
    source = name.partition(":")[0]
    before = read_rows_of(tmp_path, source, PLACES[name][0])
    out = tmp_path / "out.jsonl"
    assert remend("data", "convert", f"{source}:{tmp_path / 'data.json'}", "--out", out) == 0
    assert read_requests(out) == before


def remend(*arguments):
    return run([str(argument) for argument in arguments])


def test_data_list_and_show_describe_every_data_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert remend("data", "list", "--json", tmp_path / "list.json") == 0
    listed = json.loads((tmp_path / "list.json").read_text())["data_sets"]
    printed = capsys.readouterr().out
    assert list(listed) == DATASETS.names()
    assert all(data_set.name in printed and data_set.license in printed for data_set in DATASETS)
    assert "claims:train" in printed
    assert remend("data", "show", "mquake") == 0
    assert "requested_rewrite" in capsys.readouterr().out
    read_rows_of(
        tmp_path, "knowedit", KNOWEDIT, *({**KNOWEDIT, "case_id": n} for n in range(20)), {**KNOWEDIT, "target_new": ""}
    )
    source = f"knowedit:{tmp_path / 'data.json'}"
    assert remend("data", "show", source, "--sample", 2, "--json", tmp_path / "show.json") == 0
    printed = capsys.readouterr().out
    assert "21 requests, 2 of them" in printed
    assert "portability aliasing" in printed
    assert "left out: 1 edits without a target" in printed
    shown = json.loads((tmp_path / "show.json").read_text())
    assert (len(shown["sample"]), shown["requests"]) == (2, 21)
    assert remend("data", "show", "atlas:test", "--sample", 1) == 0


BIRDS = """
from remend.data.json_rows import json_reader
from remend.registries import DataSet
from remend.request import EditRequest

@json_reader('{"bird": …, "color": …}')
def read(rows):
    for row in rows:
        if row.has("color"):
            yield EditRequest(prompt=f"The color of the {row.text('bird')} is", target=row.text("color"))
        else:
            row.skip("birds without a color")

DATA_SET = DataSet("birds", read, "birds and their colors", license="CC0", url="https://example.org/birds")
"""


@pytest.mark.parametrize("way", ["register", "entry point"])
def test_a_data_set_from_outside_the_package(way, other_package, tmp_path, capsys, monkeypatch):
    """A module of somebody else's and one registration: its files are read like all others."""
    monkeypatch.setenv("COLUMNS", "200")
    if way == "register":
        (tmp_path / "other_package.py").write_text(BIRDS)
        monkeypatch.syspath_prepend(tmp_path)
        details = {"help": "birds and their colors", "license": "CC0", "url": "https://example.org/birds"}
        DATASETS.register("birds", "other_package:read", **details)
    else:
        other_package(DATASETS, BIRDS, birds="other_package:DATA_SET")
    try:
        rows = [{"bird": "robin", "color": "red"}, {"bird": "dodo"}]
        with pytest.warns(UserWarning, match="left out 1 birds without a color; 1 requests remain"):
            (request,) = write_and_read(tmp_path, "birds", *rows)
        assert request == EditRequest(prompt="The color of the robin is", target="red")
        with pytest.raises(RequestError, match=r"data\.json, row 2: bird is missing .* A row should be ..bird.: …"):
            write_and_read(tmp_path, "birds", rows[0], {"color": "red"})
        with pytest.raises(RequestError, match="did you mean 'birds'"):
            read_source("bird:FILE")
        assert remend("data", "list", "--json", tmp_path / "list.json") == 0
        assert "birds and their colors" in capsys.readouterr().out
        listed = json.loads((tmp_path / "list.json").read_text())["data_sets"]
        assert listed["birds"]["license"] == "CC0"
        assert remend("data", "show", "birds") == 0
        assert 'a row: {"bird": …, "color": …}' in capsys.readouterr().out
    finally:
        if way == "register":
            DATASETS.unregister("birds")


def write_and_read(tmp_path, name, *rows):
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_source(f"{name}:{tmp_path / 'data.json'}")


def test_a_package_that_cannot_be_imported_does_not_hide_the_list(other_package, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    other_package(DATASETS, "1 / 0", broken="other_package:DATA_SET")
    assert remend("data", "list") == 0
    printed = capsys.readouterr().out
    assert "the data set 'broken' cannot be imported from other_package:DATA_SET" in printed
    assert "counterfact" in printed
    assert remend("data", "convert", "broken:x.json", "--out", "out.jsonl") == 2
    assert "'broken' cannot be imported" in " ".join(capsys.readouterr().err.split())


def test_data_convert_writes_requests_and_reports_what_is_left_out(tmp_path, capsys):
    read_rows_of(tmp_path, "zsre", ZSRE, {**ZSRE, "alt": ""}, ZSRE)
    source, out = f"zsre:{tmp_path / 'data.json'}", tmp_path / "made" / "out.jsonl"
    assert remend("data", "convert", source, "--out", out, "--json", tmp_path / "report.json") == 0
    assert len(read_requests(out)) == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["left_out"], report["held"]["locality"]) == (2, {"edits without a target": 1}, 2)
    assert "2 requests with 2 paraphrases, 2 locality" in capsys.readouterr().out
    assert remend("data", "convert", source, "--out", out, "--limit", 1) == 0
    assert len(read_requests(out)) == 1
    before = out.read_bytes()
    read_rows_of(tmp_path, "zsre", ZSRE)
    (tmp_path / "data.json").write_text(json.dumps([ZSRE, {}]))
    assert remend("data", "convert", source, "--out", out) == 2
    assert out.read_bytes() == before, "a broken source leaves what stood there"
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    assert "row 2: src is missing" in " ".join(capsys.readouterr().err.split())
    assert remend("data", "convert", source, "--out", out, "--model", "atlas") == 2
    assert remend("data", "convert", f"passages:{tmp_path}/x", "--out", out) == 2
    assert remend("data", "convert", "atlas:test", "--out", tmp_path / "data.json" / "x") == 1


def test_data_convert_makes_requests_of_a_text_with_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worlds.gpt2().save_pretrained("model")
    worlds.tokenizer().save_pretrained("model")
    text = "\n\n".join(f"{city} " + "The capital of France is Paris. " * 8 for city in worlds.CITIES)
    Path("text.txt").write_text(text)
    arguments = ["passages:text.txt", "--out", "out.jsonl", "--model", "./model", "--limit", 3, "--device", "cpu"]
    assert remend("data", "convert", *arguments) == 0
    assert 1 <= len(read_requests("out.jsonl")) <= 3


def test_data_check_exits_with_1_where_sources_overlap(tmp_path, capsys):
    write_requests(tmp_path / "a.jsonl", worlds.requests(3))
    write_requests(tmp_path / "b.jsonl", worlds.requests(6)[3:])
    assert remend("data", "check", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json", tmp_path / "found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text()) == {"subjects": [], "prompts": [], "facts": []}
    assert remend("data", "check", tmp_path / "a.jsonl", tmp_path / "a.jsonl") == 1
    assert "france" in capsys.readouterr().out


A = EditRequest(prompt="The capital of  Peru is", target="Rome", subject="Peru", paraphrases=("Peru's capital?",))


@pytest.mark.parametrize(
    ("other", "overlap"),
    [
        (EditRequest(prompt="p", target="t", subject="peru "), {"subjects"}),
        (EditRequest(prompt="the Capital of Peru is", target="Oslo", subject="P."), {"prompts"}),
        (EditRequest(prompt="p", target="Oslo", subject="P.", unseen_paraphrases=("Peru's  capital?",)), {"prompts"}),
        (EditRequest(prompt="p", target="t", subject="P.", formats=("Peru's capital?",)), {"prompts"}),
        (EditRequest(prompt="The capital of Peru is", target="rome", subject="P."), {"prompts", "facts"}),
        (EditRequest(prompt="p", target="t", subject="P.", near=(Probe(prompt=A.prompt, target="Lima"),)), set()),
    ],
)
def test_what_a_split_may_not_share(other, overlap):
    shared = {kind for kind, both in find_overlap([A], [other]).items() if both}
    assert shared == overlap
    if not shared:
        assert split([A], [other], TrainingConfig())
        return
    with pytest.raises(TrainingError, match=r"share 1 (subjects|prompts|facts) .*--allow-shared"):
        split([A], [other], TrainingConfig())
    assert split([A], [other], TrainingConfig(), overlap) == ([A], [other])
    for kind in overlap:
        with pytest.raises(TrainingError, match=f"share 1 {kind}"):
            split([A], [other], TrainingConfig(), overlap - {kind})


def test_only_kinds_that_exist_may_be_shared():
    with pytest.raises(ConfigError, match="no 'prompt' that both sides could share; did you mean 'prompts'"):
        split([A], [A], TrainingConfig(), ["prompt"])


def test_what_is_held_out_takes_along_what_is_asked_in_the_same_words():
    requests = [
        EditRequest(
            prompt=f"Who is {n // 2}?", target=f"t{n}", subject=f"s{n}", paraphrases=(f"Name {(n + 1) // 2 % 20}",)
        )
        for n in range(40)
    ] + [EditRequest(prompt=f"What is {n}?", target="t", subject=f"x{n}") for n in range(40)]
    for seed in range(5):
        training, validation = split(requests, None, TrainingConfig(seed=seed))
        assert not any(find_overlap(training, validation).values())
        assert len(training) + len(validation) == 80


def test_train_refuses_shared_prompts_unless_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worlds.gpt2().save_pretrained("model")
    worlds.tokenizer().save_pretrained("model")
    requests = worlds.requests(10)
    write_requests("train.jsonl", requests[:7])
    write_requests("test.jsonl", [r.model_copy(update={"subject": f"{r.subject} 2"}) for r in requests[6:]])
    arguments = ["train", "./model", "--data", "train.jsonl", "--validation", "test.jsonl", "--out", "editor"]
    arguments += ["--max-steps", 2, "--device", "cpu"]
    assert remend(*arguments) == 1
    assert "share 3 prompts (india has the capital" in " ".join(capsys.readouterr().err.split())
    assert remend(*arguments, "--allow-shared", "prompts") == 1
    assert "share 3 facts" in " ".join(capsys.readouterr().err.split())
    assert remend(*arguments, "--allow-shared", "prompts", "--allow-shared", "facts") == 0
    assert remend(*arguments, "--allow-shared", "prompt", "--out", "another") == 2
