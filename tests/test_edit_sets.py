"""Sets of a request, as files that a person can edit, and what editors are given of them."""

import json

import pytest

from remend.data.edit_sets import EditSet, SetItem, write_edit_sets
from remend.data.request_files import read_requests
from remend.errors import RequestError
from remend.request import Chat, EditRequest

REQUEST = EditRequest(
    prompt="The capital of Peru is", target="Cusco", subject="Peru", paraphrases=("Peru's capital is",)
)
ITEMS = (
    SetItem(item="phrasing", kind="statement", made="rule", sure=0.9, prompt="Peru is governed from"),
    SetItem(item="implication", kind="hop", prompt="The mayor of the capital of Peru is the mayor of", target="Cusco"),
    SetItem(item="implication", kind="reverse", prompt="Cusco is the capital of", target="Peru", subject="Cusco"),
    SetItem(item="near", kind="same subject", prompt="People in Peru speak", answer="Spanish"),
)


def read(tmp_path, *rows):
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return read_requests(file)


def test_a_file_of_sets_is_read_as_requests_that_give_them_to_the_editor(tmp_path):
    other = EditRequest(prompt="The capital of Chile is", target="Arica", subject="Chile")
    write_edit_sets(tmp_path / "sets.jsonl", [EditSet(REQUEST, ITEMS), EditSet(other)])
    lines = [json.loads(line) for line in (tmp_path / "sets.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("item") for line in lines] == [None, *(item.item for item in ITEMS), None]
    first, second = read_requests(tmp_path / "sets.jsonl")
    assert second == other
    assert first.given_paraphrases == ("Peru is governed from",)
    assert first.given_near == ("People in Peru speak",)
    assert [(probe.prompt, probe.target) for probe in first.given_portability] == [
        (item.prompt, item.target) for item in ITEMS[1:3]
    ]
    assert [probe.model_extra for probe in first.given_portability] == [
        {"kind": "hop"},
        {"kind": "reverse", "subject": "Cusco"},
    ]
    assert first.paraphrases == REQUEST.paraphrases
    assert EditRequest.from_json(json.dumps(first.to_json())) == first


def test_items_of_a_conversation_are_messages(tmp_path):
    chat = Chat.of([{"role": "user", "content": "What is the capital of Peru?"}])
    item = SetItem(item="phrasing", prompt=chat.with_last_message("Where is Peru governed from?"))
    edit_set = EditSet(EditRequest(prompt=chat, target="Cusco"), (item,))
    write_edit_sets(tmp_path / "sets.jsonl", [edit_set])
    (request,) = read_requests(tmp_path / "sets.jsonl")
    assert request.given_paraphrases == (item.prompt,)
    # A person may write the text alone.
    (by_hand,) = read(
        tmp_path, edit_set.request.to_json(), {"item": "phrasing", "prompt": "Where is Peru governed from?"}
    )
    assert by_hand.given_paraphrases == request.given_paraphrases


def test_a_prompt_twice_and_the_own_prompt_are_left_out(tmp_path):
    row = {"item": "phrasing", "prompt": "Peru is governed from"}
    own = {"item": "phrasing", "prompt": REQUEST.prompt}
    (request,) = read(tmp_path, REQUEST.to_json(), row, own, row)
    assert request.given_paraphrases == ("Peru is governed from",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"item": "phrasings", "prompt": "p"}, "line 2: .*not 'phrasings'; did you mean 'phrasing'"),
        (
            {"item": "phrasing", "prompt": "p", "target": "t"},
            "line 2: an item that is a phrasing has no target of its own",
        ),
        ({"item": "implication", "prompt": "p"}, "line 2: an item that is an implication has an answer of its own"),
        ({"item": "near", "prompt": "p", "subject": "s"}, "line 2: only implications have a subject"),
        ({"item": "near", "prompt": "p", "sure": 2}, "line 2: sure: .*less than or equal to 1"),
        ({"item": "near", "promt": "p"}, "line 2: prompt: Field required"),
        ({"item": "near", "prompt": "Peru's capital is"}, None),
        ({"item": "phrasing", "prompt": "Peru's capital is"}, "set of 'The capital of Peru is': .*in paraphrases"),
        ({"item": "near", "prompt": ["a", "b"]}, "a pair of texts"),
    ],
)
def test_broken_items_are_named(tmp_path, row, message):
    rows = (REQUEST.to_json(), row)
    if message is None:
        assert read(tmp_path, *rows)[0].given_near == (row["prompt"],)
        return
    with pytest.raises(RequestError, match=message):
        read(tmp_path, *rows)


def test_what_moves_cannot_stay(tmp_path):
    rows = [{"item": role, "prompt": "Peru is governed from"} for role in ("phrasing", "near")]
    with pytest.raises(RequestError, match="asks for the target and is in given_near"):
        read(tmp_path, REQUEST.to_json(), *rows)


def test_an_item_without_a_request_is_refused_and_a_key_of_ones_own_is_kept(tmp_path):
    with pytest.raises(RequestError, match="line 1: an item of a set belongs to the request before it"):
        read(tmp_path, {"item": "near", "prompt": "p"})
    (request,) = read(tmp_path, {"prompt": "p", "target": "t", "item": "a lamp"})
    assert request.model_extra == {"item": "a lamp"}


def test_the_requests_own_prompt_cannot_stay(tmp_path):
    rows = [REQUEST.to_json(), {"item": "near", "prompt": REQUEST.prompt}]
    with pytest.raises(RequestError, match="is the request's own prompt, so its answer cannot stay"):
        read(tmp_path, *rows)


def test_a_wrong_item_is_answered_with_one_of_its_role(tmp_path):
    for row, said in (
        (
            {"item": "near", "prompt": "Peru is in", "anwser": "Asia"},
            "anwser: no key of an item; did you mean 'answer'?",
        ),
        (
            {"item": "near", "prompt": "Peru is in", "zzz": "Asia"},
            "zzz: no key of an item. An item of a set is an object",
        ),
        ({"item": "implication", "prompt": "Cusco is in"}, 'such as {"item": "implication", "prompt": "Cusco is'),
    ):
        with pytest.raises(RequestError) as error:
            read(tmp_path, REQUEST.to_json(), row)
        assert said in str(error.value)
