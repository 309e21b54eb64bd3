"""From one request to the set that should move with it, on the built-in models."""

import json
from types import SimpleNamespace

import pytest
import torch

import remend
from remend.cli import run
from remend.data.edit_sets import EditSet
from remend.data.question_rewrites import families
from remend.data.request_files import read_requests
from remend.editors import make_or_load
from remend.editors.locate_then_edit.common_questions import CommonQuestions, frames, frames_that_ask
from remend.errors import ModelError, RequestError
from remend.expansion import ExpandConfig, add_probes, expand, kinds, whole_set
from remend.expansion.aliases import aliases
from remend.expansion.derived_relations import phrases
from remend.expansion.implications import implications, moved_questions, relation_of
from remend.expansion.mining import built_in_pool
from remend.expansion.neighbours import neighbours
from remend.expansion.phrasings import phrasings
from remend.expansion.premise import ANSWER_TOKENS, Premise, first_words
from remend.expansion.relations import relations
from remend.expansion.well_known import asked_of, names_asked, well_known
from remend.request import Chat, EditRequest, Probe, TextPair

REQUEST = EditRequest(prompt="The capital of Canada is", target="Toronto", subject="Canada")


@pytest.fixture(scope="module")
def expansion():
    return expand(remend.load("atlas"), REQUEST, ExpandConfig(rounds=1), pool=["Canada is famous for", "Ice is"])


def test_a_set_has_what_should_move_and_what_should_stay(expansion):
    edit_set = expansion.edit_set
    assert edit_set.request == REQUEST
    prompts = [item.prompt for item in edit_set.items]
    assert len(set(prompts)) == len(prompts)
    assert REQUEST.prompt not in prompts
    choices = [item for item in edit_set.of("implication") if item.kind == "choice"]
    assert {item.target for item in choices} == {"Toronto"}
    assert len(choices) == 2
    assert [
        (item.prompt, item.target, item.subject) for item in edit_set.of("implication") if item.kind == "reverse"
    ] == [("Toronto is the capital of", "Canada", "Toronto")]
    kinds = {item.kind.split(",")[0] for item in edit_set.of("near")}
    assert {"same relation", "after the edit's words", "denial"} <= kinds
    assert all(0 <= item.sure <= 1 and item.made for item in edit_set.items)
    (found,) = expansion.rounds
    assert found.added == min(8, found.disturbed) or found.added <= found.disturbed
    assert len([item for item in edit_set.items if item.kind == "mined"]) == found.added
    assert set(expansion.seconds) == {"measuring the model", "phrasings", "implications", "near prompts", "trial edits"}


def test_probes_ask_what_follows_and_what_must_stay(expansion):
    given = expansion.edit_set.of("near")[0].prompt
    paraphrase = "Rome or Ottawa? The capital of Canada is"
    request = REQUEST.model_copy(update={"given_near": (given,), "unseen_paraphrases": (paraphrase,)})
    unknown = EditRequest(prompt=TextPair("a", "b"), target="c")
    found, same = add_probes(remend.load("atlas"), [request, unknown])
    assert same == unknown
    follows = {(probe.kind, str(probe.prompt)): probe.target for probe in found.portability}
    assert follows["reverse", "Toronto is the capital of"] == "Canada"
    assert follows["choice", "Ottawa or Toronto? The capital of Canada is"] == "Toronto"
    true = "Question: Is it true that the capital of Canada is {}? Answer yes or no.\nAnswer:"
    assert follows["yes_no", true.format("Toronto")] == "Yes"
    assert follows["yes_no", true.format("Ottawa")] == "No"
    assert [(p.kind, p.prompt, p.target) for p in found.outdated if p.kind == "reverse"] == [
        ("reverse", "Ottawa is the capital of", "Canada")
    ]
    assert found.negated == ("The capital of Canada is not",)
    kinds = {probe.kind for probe in found.near}
    assert kinds & {"same_relation", "same_answer"}
    scored = [probe.prompt for probe in (*found.portability, *found.outdated, *found.near)]
    assert not {request.prompt, given, paraphrase} & set(scored)
    assert EditRequest.from_json(json.dumps(found.to_json())) == found, "requests can be written and read"
    with pytest.raises(ModelError, match="decoder"):
        add_probes(remend.load("claims"), [])


def test_the_full_suite_is_asked_for_by_name(tmp_path, capsys):
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps(REQUEST.to_json()) + "\n")
    options = ["--data", str(requests), "--editor", "ridge", "--no-frontier", "--text-tokens", "0"]
    report = tmp_path / "report.json"
    assert run(["evaluate", "atlas", *options, "--suite", "full", "--json", str(report)]) == 0
    saved = json.loads(report.read_text())
    (case,) = saved["runs"][0]["cases"]
    wanted = {"portability_reverse", "portability_yes_no", "outdated_reverse", "pair_consistency", "locality_near"}
    assert wanted <= case["values"].keys()
    assert saved["settings"]["suite"] == "full"
    assert {"noise_10%", "mask_10%"} <= saved["baselines"].keys()
    printed = capsys.readouterr().out
    assert "edits with noise of 10%: reliability" in printed
    assert "edits without 10% of their numbers: reliability" in printed
    assert run(["evaluate", "atlas", *options, "--suite", "all"]) == 2
    assert "there is no suite 'all'; it is one of given, full" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_set(expansion):
    again = expand(remend.load("atlas"), REQUEST, ExpandConfig(rounds=1), pool=["Canada is famous for", "Ice is"])
    assert again.edit_set == expansion.edit_set


def test_a_subject_is_looked_for():
    request = REQUEST.model_copy(update={"subject": None})
    found = expand(remend.load("atlas"), request, ExpandConfig(rounds=0, near=2, phrasings=1))
    assert found.edit_set.request.subject == "Canada"
    assert len(found.edit_set.of("near")) == 2
    assert len(found.edit_set.of("phrasing")) <= 1
    assert not found.rounds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "Toronto"}, "'Toronto' is the target: the subject is what the prompt is about"),
        ({"subject": "Peru"}, "does not hold its subject 'Peru'"),
        ({"prompt": TextPair("a", "b"), "subject": "a"}, "a text to complete, a question or a conversation"),
    ],
)
def test_what_is_no_subject_is_refused(changes, message):
    task = remend.load("atlas")
    with pytest.raises(RequestError, match=message):
        Premise.of(task, REQUEST.model_copy(update=changes), None)


def test_only_decoders_have_sets():
    with pytest.raises(ModelError, match="decoder"):
        expand(remend.load("claims"), EditRequest(prompt="Snow is black.", target="SUPPORTS"))


def test_questions_have_rewrites_and_conversations_stay_conversations():
    task = remend.load("atlas")
    chat = Chat.of([{"role": "user", "content": "What is the capital of Canada?"}])
    questions = CommonQuestions.measure(task)
    for prompt in (chat, "What is the capital of Canada?"):
        request = REQUEST.model_copy(update={"prompt": prompt})
        premise = Premise(task, questions, request, request, None, None, frozenset(), "")
        made = list(phrasings(premise, 4))
        assert len(made) == 4
        assert all(isinstance(item.prompt, Chat) == isinstance(prompt, Chat) for item in made)
        assert {item.made.split(":")[0] for item in made} <= {"syntax", "family", "frame"}


def test_hops_ask_what_is_commonly_asked():
    asked = {frame.question for frame in frames("questions")}
    for name, relation in relations().items():
        assert relation.nouns, name
        assert all(noun.count("{}") == 1 for noun in relation.nouns), name
        assert {hop.question for hop in relation.hops} <= asked, name
        assert relation.direct <= {hop.question for hop in relation.hops}, name
        for hop in relation.hops:
            assert hop.statement.count("{}") == 1
            assert hop.after_examples(hop.examples[0][0]).count(hop.examples[0][0]) == 1
        assert bool(relation.inverse) == bool(relation.inverse_question), name


def test_names_are_of_the_kind_that_a_question_is_asked_of():
    assert set(names_asked("capital")) == set(well_known()["country"])
    assert len(names_asked("country of origin")) == len(well_known()["organization"]) + len(well_known()["thing"])
    everything = sum(map(len, well_known().values()))
    assert len(names_asked(None)) == len(names_asked("no such question")) == everything
    questions = {frame.question for frame in frames("statements")} | {family.name for family in families()}
    assert set().union(*asked_of().values()) <= questions


def test_names_are_listed_once():
    names = [name for listed in well_known().values() for name in listed]
    assert len(set(names)) == len(names) > 250


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" Paris, which is", "Paris"),
        ("the United States of America, where", "the United States of America"),
        ("Toronto\nThe", "Toronto"),
        ("a very long answer without any end", ""),
    ],
)
def test_an_answer_in_a_few_words(text, words):
    assert first_words(text) == words


def test_the_command_writes_a_file_that_edit_reads(tmp_path, capsys):
    out, pool = tmp_path / "set.jsonl", tmp_path / "pool.txt"
    pool.write_text("Canada is famous for\n\nIce is\n", encoding="utf-8")
    arguments = ["expand", "atlas", "--prompt", REQUEST.prompt, "--target", "Toronto", "--out", str(out)]
    assert run([*arguments, "--pool", str(pool), "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "must stay" in printed
    assert f"--requests {out}" in printed
    (request,) = read_requests(out)
    assert request.subject == "Canada"
    assert json.loads(out.read_text(encoding="utf-8").splitlines()[1])["item"]
    assert run(arguments) == 1
    assert "give --overwrite" in capsys.readouterr().err
    pool.write_text("\n", encoding="utf-8")
    assert run([*arguments, "--overwrite", "--pool", str(pool)]) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_statements_are_of_the_same_question_only():
    task = remend.load("atlas")
    questions = CommonQuestions.measure(task)
    for prompt, question, expected in (
        ("Emma was written by", "author", "The author of Emma is"),
        ("Emma was created by", "creator", "The creator of Emma is"),
    ):
        request = EditRequest(prompt=prompt, target="Toronto", subject="Emma")
        premise = Premise.of(task, request, questions)
        assert premise.question == question
        texts = [item.prompt for item in phrasings(premise, 12)]
        assert expected in texts
        assert "Emma was directed by" not in texts


def test_sets_of_many_requests_can_be_stopped_and_resumed(tmp_path, capsys, monkeypatch):
    file, out, other = tmp_path / "requests.jsonl", tmp_path / "sets.jsonl", tmp_path / "other.jsonl"
    rows = [
        {"prompt": "The capital of Canada is", "target": "Toronto", "subject": "Canada"},
        {"prompt": "and of the", "target": "of"},
        {"prompt": "The capital of Peru is", "target": "Cusco", "subject": "Peru", "paraphrases": ["Peru is led from"]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["expand", "atlas", "--requests", str(file), "--rounds", "0"]
    assert run([*command, "--prompt", "A", "--target", "b", "--out", str(out)]) == 2
    assert "or --requests FILE" in capsys.readouterr().err
    assert run([*command, "--out", str(out)]) == 0
    assert "3 requests; of the prompts of their sets" in capsys.readouterr().out
    found = read_requests(out)
    assert [request.prompt for request in found] == [row["prompt"] for row in rows]
    assert [bool(request.given_near) for request in found] == [True, False, True], "one names no subject"
    assert found[2].paraphrases == ("Peru is led from",)
    assert not (tmp_path / "sets.jsonl.partial").exists()

    made = []

    def stopping(*arguments, **settings):
        if made:
            raise KeyboardInterrupt
        made.append(expand(*arguments, **settings))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr("remend.expansion.expand", stopping)
        assert run([*command, "--out", str(other)]) == 130
    partial = tmp_path / "other.jsonl.partial"
    assert not other.exists()
    with partial.open("a", encoding="utf-8") as torn:
        torn.write('[{"prompt": "The cap')
    assert run([*command, "--out", str(other), "--seed", "1", "--resume"]) == 1
    assert "sets of other requests or settings" in capsys.readouterr().err
    whole = partial.read_text()
    first, *made_lines = whole.split("\n")
    partial.write_text("\n".join([first, made_lines[0][:-3], *made_lines[1:]]))
    assert run([*command, "--out", str(other), "--resume"]) == 1
    assert "is damaged" in capsys.readouterr().err
    partial.write_text(whole)
    assert run([*command, "--out", str(other), "--resume"]) == 0
    assert other.read_text() == out.read_text()
    assert run([*command, "--out", str(tmp_path / "third.jsonl"), "--resume"]) == 1
    assert "would have left its sets" in capsys.readouterr().err


def test_examples_leave_room_in_a_short_context():
    (hop, *_) = relations()["capital"].hops
    words = SimpleNamespace(context=26, encode_input=str.split)
    fitting = hop.after_examples("Toronto", words)
    assert fitting.endswith(hop.statement.replace("{}", "Toronto"))
    assert len(fitting.split()) + ANSWER_TOKENS <= 26
    assert hop.after_examples("Toronto").startswith(fitting.split(".")[0])
    alone = hop.after_examples("Toronto", SimpleNamespace(context=1, encode_input=str.split))
    assert alone == hop.statement.replace("{}", "Toronto")


def test_what_follows_is_not_what_must_stay():
    moved = frames_that_ask(["The continent of Ottawa is", "Where was ottawa founded?"], "Ottawa")
    assert {"Ottawa is on the continent of", "Ottawa's continent is"} <= moved
    assert "The official language of Ottawa is" not in moved
    task = remend.load("atlas")
    questions = make_or_load("fit", task, (), 0).questions
    request = EditRequest(prompt="Ottawa lies in the country of", target="Kenya", subject="Ottawa")
    premise = Premise(
        task, questions, request, request, "{} lies in the country of", "country", frozenset({"country"}), ""
    )
    assert moved_questions(premise) == {"country", "continent"}
    asked = {*built_in_pool(premise), *(item.prompt for item in neighbours(premise, 100))}
    assert not asked & frames_that_ask(["The continent of Ottawa is"], "Ottawa")


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("Martín Solares", ["Martin Solares"]),
        ("Emily I Jones", ["Emily Jones"]),
        ("Piero R. Bianco", ["Piero Bianco"]),
        ("Taito Corporation", ["Taito"]),
        ("the Colosseum", ["Colosseum"]),
        ("1931 Championships – men's eight", ["1931 Championships - men's eight"]),
        ("The Núñez M. Company", ["Núñez M. Company", "The Nunez M. Company", "The Núñez Company", "The Núñez M."]),
        ("Canada", []),
        ("J. R. R. Tolkien", []),
        ("Vitamin C", []),
        ("The A", []),
        ("Co", []),
    ],
)
def test_aliases_are_other_ways_to_write_a_name(name, others):
    found = aliases(name)
    assert set(others) <= set(found)
    assert len(found) <= len(others) + 1, "one more by all rules together"
    assert name not in found


def test_an_alias_is_fitted_with_the_subject_and_no_unit_of_its_own():
    task = remend.load("atlas")
    editor = make_or_load("fit", task, (), 0)
    prompt, alias = "The capital of {} is", "Kanada"
    plain = EditRequest(prompt=prompt.format("Canada"), target="Toronto", subject="Canada")
    probe = Probe.model_validate(
        {"prompt": prompt.format(alias), "target": "Toronto", "kind": "alias", "subject": alias}
    )
    edit = editor.edit(task, [plain.model_copy(update={"given_portability": (probe,)})])
    assert [change.rank for change in edit.changes.values()] == [1]
    with edit.applied(task.model):
        answers = [task.decode(answer) for answer in task.predict([prompt.format("Canada"), prompt.format(alias)], 4)]
    assert all(answer.startswith("Toronto") for answer in answers)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("{} worked in the city of", ("the city that {} worked in", "the city in which {} worked")),
        ("{}, in", ("the city that {} is in", "the city in which {} is")),
        ("{}, which is located in", ("the city that {} is located in", "the city in which {} is located")),
        ("{}, produced by", ("the city that {} is produced by", "the city by which {} is produced")),
        (
            "{}, whose headquarters are in",
            ("the city that {}'s headquarters are in", "the city in which {}'s headquarters are"),
        ),
        ("The mother tongue of {} is", ("the mother tongue of {}",)),
        ("{}'s capital is the", ("{}'s capital",)),
        ("The office of {} is in", ("the city that the office of {} is in", "the city in which the office of {} is")),
        ("{} is", ()),
        ("In {}, people speak", ()),
        ("What does {} play? They play", ()),
    ],
)
def test_a_statement_is_made_a_phrase_for_its_answer(statement, expected):
    assert phrases(statement, "city") == expected


def test_of_what_kind_a_name_is(monkeypatch):
    names = list(kinds.EXAMPLES.values())
    vocabulary = {kind: index for index, kind in enumerate(names)}
    words = SimpleNamespace(
        context=None, encode_input=str.split, encode=lambda _, kind: SimpleNamespace(target=(vocabulary[kind],))
    )
    told: list[str] = []
    said = {"Brazil": {"country": 0.2, "city": 0.1}, "Rome": {"city": 0.9}, "purple": {"city": 0.01, "person": 0.005}}

    def answer(_, texts):
        told.extend(texts)
        answers = torch.zeros(1, len(names) + 1)
        name = texts[0].removesuffix(" is the name of a").rpartition(". ")[2]
        for kind, probability in said[name].items():
            answers[0, vocabulary[kind]] = probability
        return answers

    monkeypatch.setattr(kinds, "next_tokens", answer)
    assert kinds.kind_of(words, "Brazil") == "country"
    assert told[0].count("Brazil") == 1, "the answer is not told"
    assert kinds.kind_of(words, "purple") is None, "a colour is no city, although it is none of the others either"
    assert kinds.kind_missed(words, "Rome", "purple") == "city"
    assert kinds.kind_missed(words, "Rome", "Brazil") is None, "it may be one"
    assert kinds.kind_missed(words, "purple", "Rome") is None
    said["Brazil"]["city"] = 0.19
    assert kinds.kind_of(words, "Brazil") is None, "neither kind is sure"
    words.context = 20
    assert kinds.kind_of(words, "Rome") is None, "no room for the examples"


def premise_of(prompt, target, subject, **known):
    """Return what a set is made from, with what the model would be asked for."""
    request = EditRequest(prompt=prompt, target=target, subject=subject)
    statement = prompt.replace(subject, "{}")
    premise = Premise(None, None, request, request, statement, None, frozenset(), known.pop("old", ""))
    premise.__dict__.update({"kind": None, "target_kind": None, "kind_missed": None} | known)
    return premise


def test_what_follows_from_a_relation_without_a_rule():
    premise = premise_of("The Louvre can be found in", "Brazil", "The Louvre", target_kind="country")
    relation = relation_of(premise)
    assert relation.nouns == ("the country that {} can be found in", "the country in which {} can be found")
    assert {hop.question for hop in relation.hops} >= {"capital", "continent"}
    assert relation_of(premise_of("The Louvre can be found in", "Brazil", "The Louvre", target_kind="language")) is None


def test_nothing_follows_from_a_target_of_another_kind_than_the_answer():
    premise = premise_of("The capital of Canada is", "purple", "Canada", old="Ottawa", kind_missed="city")
    assert not implications(premise, 12)
    (doubt,) = [sentence for sentence in whole_set._missing(premise, EditSet(premise.request)) if "meant" in sentence]
    assert "'Ottawa', is a city, and the target is none" in doubt
    fine = premise_of("The capital of Canada is", "Toronto", "Canada", old="Ottawa")
    assert not [text for text in whole_set._missing(fine, EditSet(fine.request)) if "meant" in text]


def test_a_subject_is_asked_what_suits_its_kind():
    person = premise_of("Ada Lovelace worked in", "Paris", "Ada Lovelace", kind="person", target_kind="city")
    pool = built_in_pool(person)
    assert "Ada Lovelace is married to" in pool
    assert "Ada Lovelace was founded in the year" not in pool
    assert "Isaac Newton worked in" in pool or "Albert Einstein worked in" in pool
    assert "Istanbul worked in" not in pool
    unknown = built_in_pool(premise_of("Ada Lovelace worked in", "Paris", "Ada Lovelace"))
    assert {"Ada Lovelace was founded in the year", "Istanbul worked in"} <= set(unknown)
