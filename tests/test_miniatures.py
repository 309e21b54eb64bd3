"""The question answerer and the fact checker that ship with remend, and the requests about what they know."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import remend
from remend.assets import CLAIMS_FOLDER, QUESTIONS_FOLDER
from remend.data import atlas, atlas_claims, atlas_questions
from remend.data.atlas_claims import LABELS, Claim
from remend.errors import RequestError

FACT_SETS = {"questions": atlas_questions.fact_set, "claims": atlas_claims.claim_set}
LARGEST_SCALE = 4_000_000


@pytest.fixture(scope="module")
def checker():
    folder = CLAIMS_FOLDER / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def judged(checker, texts):
    """The labels that the checker gives to claims."""
    model, tokenizer = checker
    found = []
    for start in range(0, len(texts), 256):
        with torch.no_grad():
            logits = model(**tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")).logits
        found += [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    return found


@pytest.mark.parametrize("name", FACT_SETS)
def test_phrasings(name):
    relations = FACT_SETS[name]().relations
    assert relations.keys() == atlas.relations().keys()
    every = [phrasing for relation in relations.values() for phrasing in relation.all_phrasings]
    assert len(set(every)) == len(every), "a phrasing asks for one relation only"
    slots = ("{}",) if name == "questions" else ("{subject}", "{object}")
    assert all(phrasing.count(slot) == 1 for phrasing in every for slot in slots)


@pytest.mark.parametrize("name", FACT_SETS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_requests(name, split):
    requests = remend.read_source(f"{name}:{split}")
    assert len(requests) >= 290
    assert len({request.id for request in requests}) == len(requests)
    for request in requests:
        own = {request.prompt, *request.paraphrases, *request.unseen_paraphrases}
        assert len(own) == 5
        assert own.isdisjoint(probe.prompt for probe in (*request.locality, *request.near))
        assert len(request.locality) == 4
        assert request.near
        assert request.target != request.model_extra["ground_truth"]


@pytest.mark.parametrize("name", FACT_SETS)
def test_splits_are_the_atlas_s(name):
    """By subject; so no two splits share one."""
    for split in atlas.SPLITS:
        asked = {request.subject for request in remend.read_source(f"{name}:{split}")}
        assert asked == {fact.subject for fact in atlas.facts() if fact.split == split}


@pytest.mark.parametrize("name", FACT_SETS)
def test_a_split_that_is_not_there(name):
    with pytest.raises(RequestError, match=f"{name} has no split 'tset'; it has {name}:train"):
        remend.read_source(f"{name}:tset")


def test_false_claims_are_false():
    """No fact says them, in any relation or in the other direction, nor names what is claimed and what is true."""
    known = atlas_claims.claim_set()
    stated = {frozenset((fact.subject, fact.object)) for fact in known.facts}
    for fact in known.facts:
        false = known.false_objects(fact)
        assert len(false) >= 2
        for claimed in false:
            assert claimed != fact.object
            assert stated.isdisjoint((frozenset((claimed, fact.subject)), frozenset((claimed, fact.object))))
            assert Claim(fact, claimed).label == "false"
        assert Claim(fact, fact.object).label == "true"


def test_who_died_in_a_city_died_in_its_country():
    known = atlas_claims.claim_set()
    stockholm = next(fact for fact in known.facts if (fact.relation, fact.object) == ("P740", "Stockholm"))
    assert "Sweden" in known.objects["P740"]
    assert "Sweden" not in known.false_objects(stockholm)
    assert "Rome" in known.false_objects(stockholm)


def test_claims_are_edited_both_ways():
    requests = atlas_claims.requests("test")
    flipped = sum(request.target == "true" for request in requests)
    assert 0.4 < flipped / len(requests) < 0.6
    truth = {(fact.relation, fact.subject): fact.object for fact in atlas.facts()}
    for request in requests:
        assert {request.target, request.model_extra["ground_truth"]} == set(LABELS)
        said = truth[request.model_extra["relation"], request.subject]
        assert (request.model_extra["ground_truth"] == "true") == all(said in p for p in request.paraphrases)
        kinds = {probe.model_extra["kind"] for probe in request.near}
        assert kinds <= {"same_object", "same_relation", "another_object", "same_subject"}
        for probe in request.near:
            if probe.model_extra["kind"] == "same_object":
                assert probe.target == request.model_extra["ground_truth"]


def test_the_question_answerer_knows_its_facts():
    """A tenth of them, in every phrasing, by real greedy decoding; the script that trains it checks them all."""
    task = remend.load("questions", "cpu")
    known = atlas_questions.fact_set()
    asked = [
        (phrasing.format(fact.subject), fact.object)
        for fact in known.facts[::10]
        for phrasing in known.relations[fact.relation].all_phrasings
    ]
    answers = task.predict([prompt for prompt, _ in asked])
    right = sum(answer == task.encode(*pair).target for answer, pair in zip(answers, asked, strict=True))
    assert right / len(asked) >= 0.98


def test_the_fact_checker_knows_what_is_true(checker):
    """On a tenth of the facts, in every phrasing, beside two false claims each."""
    known = atlas_claims.claim_set()
    asked = [
        (claim.text(phrasing), claim.label)
        for fact in known.facts[::10]
        for claimed in (fact.object, *sorted(known.false_objects(fact))[:2])
        for phrasing in known.relations[fact.relation].all_phrasings
        for claim in (Claim(fact, claimed),)
    ]
    labels = judged(checker, [text for text, _ in asked])
    for wanted in LABELS:
        hits = [label == wanted for label, (_, true) in zip(labels, asked, strict=True) if true == wanted]
        assert sum(hits) / len(hits) >= 0.98, wanted


def test_the_fact_checker_s_labels(checker):
    assert checker[0].config.id2label == {0: "false", 1: "true"} == dict(enumerate(LABELS))
    assert judged(checker, ["London is the capital of England.", "London is the capital of Greece."]) == [
        "true",
        "false",
    ]


@pytest.mark.parametrize("folder", [QUESTIONS_FOLDER, CLAIMS_FOLDER])
def test_sizes(folder):
    assert sum(file.stat().st_size for file in (folder / "model").iterdir()) <= LARGEST_SCALE
