"""Other ways to ask a question, by rules."""

import pytest

from remend.data.question_rewrites import families, families_of, rewrites, template_of
from remend.data.verb_forms import lemma_of, participle, past


@pytest.mark.parametrize(
    ("question", "subject", "expected"),
    [
        ("Which position was held by Ana Diaz?", "Ana Diaz", "What position did Ana Diaz hold?"),
        ("Which position was held by Ana Diaz?", "Ana Diaz", "Ana Diaz held which position?"),
        ("What title does Ana Diaz wear?", "Ana Diaz", "Ana Diaz wears which title?"),
        ("What city did Ana Diaz live in?", "Ana Diaz", "In what city did Ana Diaz live?"),
        ("What city did Ana Diaz live in?", "Ana Diaz", "Ana Diaz lived in which city?"),
        ("For what crime was Ana Diaz prosecuted?", "Ana Diaz", "What crime was Ana Diaz prosecuted for?"),
        ("At which place did Ana Diaz die?", "Ana Diaz", "Ana Diaz died at which place?"),
        ("To which work does Ana Diaz appear in?", "Ana Diaz", "Which work does Ana Diaz appear in?"),
        ("What is the date of death for Ana Diaz?", "Ana Diaz", "What is Ana Diaz's date of death?"),
        ("What's Ana Diaz's date of death?", "Ana Diaz", "The date of death of Ana Diaz is what?"),
        ("The birth date of Ana Diaz is what?", "Ana Diaz", "Tell me the birth date of Ana Diaz."),
        ("What is the name of the publisher of Emma?", "Emma", "Who published Emma?"),
        ("Who wrote Emma?", "Emma", "By whom was Emma written?"),
        ("Which company made Emma?", "Emma", "Emma was made by which company?"),
        ("What team is Ana Diaz associated with?", "Ana Diaz", "With what team is Ana Diaz associated?"),
        ("What is the constellation that is made with NGC 1?", "NGC 1", "Which constellation is made with NGC 1?"),
        ("Which was the position that Ana Diaz held?", "Ana Diaz", "Which position did Ana Diaz hold?"),
        ("What was the house that Ana Diaz was from?", "Ana Diaz", "Which house was Ana Diaz from?"),
        ("Where is Emma located?", "Emma", "Where can Emma be found?"),
        ("When did Ana Diaz die?", "ana diaz", "What was the date of death of ana diaz?"),
        ("In the film Emma, who was the star?", "Emma", "Who was the star in the film Emma?"),
    ],
)
def test_a_question_in_other_words(question, subject, expected):
    assert expected in [rewrite.about(subject) for rewrite in rewrites(question, subject, 40)]


def test_rewrites_differ_from_the_question_and_each_other():
    made = rewrites("What is the capital of Peru?", "Peru", 40)
    texts = [rewrite.template for rewrite in made]
    assert len(set(texts)) == len(texts)
    assert "What is the capital of {}?" not in texts
    assert all(text.count("{}") == 1 for text in texts)
    assert (
        rewrites("What is the capital of Peru?", "Peru", 3) == rewrites("What is the capital of Peru?", "Peru", 40)[:3]
    )


def test_where_no_rule_fits_only_frames_are_put_around_the_question():
    made = rewrites("How come that Zog is purple these days?", "Zog")
    assert {rewrite.source for rewrite in made} == {"frame"}
    assert "Tell me: How come that {} is purple these days?" in [rewrite.template for rewrite in made]


def test_a_question_of_two_families_is_not_guessed_at():
    assert len(families_of("What artist created {}?")) > 1
    assert {rewrite.source for rewrite in rewrites("What artist created Zog?", "Zog", 40)} == {"syntax", "frame"}


@pytest.mark.parametrize("question", ["What is the capital?", "Is Peru near Peru?"])
def test_a_subject_that_is_not_there_or_twice_has_no_rewrites(question):
    assert template_of(question, "Peru") is None
    assert rewrites(question, "Peru") == []


def test_every_family_asks_what_its_own_questions_ask():
    for family in families():
        templates = list(family.templates("is"))
        assert templates, family.name
        assert all(template.count("{}") == 1 for template in templates), family.name
        assert all(template[0].isupper() or template.startswith("{}") for template in templates), family.name


def test_forms_of_verbs():
    assert (past("write"), participle("write"), lemma_of("written")) == ("wrote", "written", "write")
    assert (past("marry"), participle("star"), lemma_of("Created")) == ("married", "starred", "create")
    assert (past("zog"), lemma_of("zogged")) == (None, None)


@pytest.mark.parametrize(
    ("question", "subject", "expected", "unwanted"),
    [
        (
            "What language do people speak in Suriname?",
            "Suriname",
            "Which language is spoken in Suriname?",
            "grow up",
        ),
        (
            "What language do people speak in Suriname?",
            "Suriname",
            "Tell me: What language do people speak in Suriname?",
            "official",
        ),
        ("What is the official language of Suriname?", "Suriname", "Which language is official in Suriname?", "people"),
        ("When did the Titanic sink?", "the Titanic", "Tell me: When did the Titanic sink?", "time"),
        ("Where was Paul Klee born?", "Paul Klee", "Paul Klee was born where?", "town"),
        ("What is the largest city of Turkey?", "Turkey", "Tell me the largest city of Turkey.", "home"),
        ("Who invented the zipper?", "the zipper", "Whose invention is the zipper?", "discover"),
        ("Which river flows through Budapest?", "Budapest", "Tell me: Which river flows through Budapest?", "into"),
        ("What is the highest mountain in Tanzania?", "Tanzania", "Tell me the highest mountain in Tanzania.", "range"),
        (
            "Which religion does the Dalai Lama follow?",
            "the Dalai Lama",
            "The Dalai Lama follows which religion?",
            "{}",
        ),
        ("Which religion does eBay follow?", "eBay", "eBay follows which religion?", "EBay"),
    ],
)
def test_questions_that_look_like_another_one(question, subject, expected, unwanted):
    texts = [rewrite.about(subject) for rewrite in rewrites(question, subject, 12)]
    assert expected in texts
    assert not [text for text in texts if unwanted in text]
