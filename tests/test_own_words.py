"""Targets within the sentence that the model itself would say."""

import pytest

import remend
import scripted
from remend.request import EditRequest
from remend.tasks.own_words import TARGET_AS_GIVEN, _first_clause, _possible_places, as_the_model_says

CAPITAL = "What is the capital of France ?"
SAID = "The capital of France is Paris"
WORDS = (*CAPITAL.split(), *SAID.split(), "Rome", "Rome.", "Oslo", "I", "know", "nothing", "it", "in", "Who", "Bern")


def model(**answers):
    script = {CAPITAL: SAID, "Who is it ?": "Oslo", "capital of Bern ?": "I know nothing of it"} | answers
    return scripted.model(script, tuple(dict.fromkeys(WORDS)))


def request(prompt=CAPITAL, target="Rome", **more):
    return EditRequest(prompt=prompt, target=target, **more)


def test_the_target_stands_in_the_models_own_sentence():
    task = model()
    taught = as_the_model_says(task, request(paraphrases=("capital of France ?",)))
    assert (taught.target, taught.model_extra[TARGET_AS_GIVEN]) == ("The capital of France is Rome", "Rome")
    assert taught.paraphrases == ("capital of France ?",)
    assert remend.as_the_model_says(task, taught) == taught, "a sentence stays as it is"


@pytest.mark.parametrize(
    "kept",
    [
        request(target="Paris"),  # what the model says already
        request("Who is it ?"),  # the answer is the thing itself
        request("capital of Bern ?"),  # a sentence about something else
        request(target="The capital of France is Oslo"),
        request(target="Oslo is the capital of France since 1900"),  # a sentence by itself, longer than the model's own
        request(target="Oslo in it rules France today", subject="France"),
        request(target="In it capital Oslo"),
    ],
)
def test_where_it_is_unsure_the_users_words_are_kept(kept):
    assert as_the_model_says(model(), kept) is kept


def test_the_answer_that_a_request_names_is_replaced():
    task = model(**{"Who is it ?": "I know Paris in it"})
    named = as_the_model_says(task, request("Who is it ?", ground_truth="Paris"))
    assert named.target == "I know Rome in it"
    twice = model(**{"Who is it ?": "Paris know Paris in it"})
    assert as_the_model_says(twice, unchanged := request("Who is it ?", ground_truth="Paris")) is unchanged


def test_what_follows_where_the_prompt_is_restated_is_replaced():
    long = "The capital of France is nothing I know in it I know nothing of in it"
    taught = as_the_model_says(model(**{CAPITAL: long}), request())
    assert (taught.target, taught.model_extra[TARGET_AS_GIVEN]) == ("The capital of France is Rome.", "Rome")
    for said in (
        "I know nothing of it in it I know nothing in it I know",  # says nothing again
        "France is nothing I know in it I know nothing in it it",  # says the subject again, not the question
        "Bern in it capital of France is nothing I know in it I know nothing in it",  # begins with something else
    ):
        assert as_the_model_says(model(**{CAPITAL: said}), unchanged := request()) is unchanged


def test_what_the_model_says_after_its_first_sentence_does_not_count():
    task = scripted.model({CAPITAL: f"{SAID}. Rome is in it"}, tuple(dict.fromkeys((*WORDS, "Paris."))))
    assert as_the_model_says(task, request()).target == "The capital of France is Rome."


QUESTIONS = [
    ("What is the capital of Australia?", "The capital of Australia is Canberra.", ["Canberra"]),
    ("Where was Einstein born?", "Einstein was born in Ulm.", ["in Ulm", "Ulm"]),
    ("From what city is the band Guns N' Roses?", "The band Guns N' Roses originated in Los Angeles.",
     ["originated in Los Angeles", "in Los Angeles", "Los Angeles"]),
    ("Who makes the iPhone?", "Apple makes the iPhone.", ["Apple"]),
    ("Who is the chair of Mazaca?", "Samy is a singer from a show about black men.", []),
    ("In which part of Britain is the Rosebery Farm?", "The Rosebery Farm is in the North East of England.", []),
    ("Where is the headquarters of Google?", "Google's headquarters are near the headquarters of Google of Ulm.", []),
    ("Who is Jesús Orejuela's sibling?", "Jesús Orejuela is a Spanish actor.", []),
    # A year that the model made up must not stay beside the place.
    ("Where was the painter Ada born?", "The painter Ada was born in 1922 in the town of Ash.",
     ["in 1922 in the town of Ash", "1922 in the town of Ash"]),
    ("Where was the painter Ada born?", "The painter Ada was born in the USA.",
     ["in the USA", "the USA", "USA"]),
    ("澳大利亚的首都是哪里？", "澳大利亚的首都是堪培拉。", []),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "sentence", "places"), QUESTIONS)
def test_places_at_the_edge_of_a_sentence_that_restates_the_prompt(prompt, sentence, places):
    assert [sentence[place.start : place.end] for place in _possible_places(sentence, prompt)] == places


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("It is Bill Gates, who founded it.", "It is Bill Gates."),
        ("It is in Paris.\n\nThe", "It is in Paris."),
        ("It has 1,000 parts", "It has 1,000 parts"),
        ("It is 3.5 m long. Yes", "It is 3.5 m long."),
        ("A line\nanother", "A line"),
    ],
)
def test_the_first_clause(text, clause):
    assert _first_clause(text, ended=True) == clause


def test_a_clause_that_was_cut_off_is_none():
    assert not _first_clause("The capital of", ended=False)


def test_classifiers_and_empty_lists():
    from remend.tasks.own_words import as_the_model_says_each

    assert as_the_model_says_each(model(), []) == []
