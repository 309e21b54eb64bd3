"""Reading request files: what is accepted, and the message for everything that is not."""

import datetime
import json
import re

import pytest

import worlds
from remend.data import read_source, read_text
from remend.data.request_files import read_requests
from remend.errors import RequestError
from remend.request import EditRequest, Probe, write_requests

GOOD = '{"prompt": "The capital of France is", "target": "Lyon"}'


def test_what_is_written_is_read_back(tmp_path):
    file = tmp_path / "requests.jsonl"
    written = [*worlds.requests(3), EditRequest(prompt="é", target="ß", relation="P36", notes={"kept": True})]
    write_requests(file, written)
    assert read_requests(file) == written
    assert read_requests(file)[3].model_extra == {"relation": "P36", "notes": {"kept": True}}


def test_values_that_json_does_not_have_can_be_written(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "p", "target": "t", "score": NaN}')
    (request,) = read_requests(file)
    dated = EditRequest(prompt="p", target="t", day=datetime.date(2020, 2, 3))
    write_requests(file, [request, dated])
    assert [r.model_extra for r in read_requests(file)] == [{"score": None}, {"day": "2020-02-03"}]


def test_all_keys_a_byte_order_mark_and_blank_lines(tmp_path):
    file = tmp_path / "requests.jsonl"
    full = (
        '{"prompt": "p", "target": "t", "subject": "s", "id": 7, "paraphrases": ["q"], "unseen_paraphrases": ["r"],'
        ' "given_paraphrases": ["g"],'
        ' "locality": [{"prompt": "a", "target": "b"}], "near": [], "portability": [{"prompt": "c", "target": "d"}]}'
    )
    file.write_bytes(b"\xef\xbb\xbf" + full.encode() + b"\r\n\n" + GOOD.encode())
    first, second = read_requests(file)
    assert (first.id, first.paraphrases, first.locality[0]) == (7, ("q",), Probe(prompt="a", target="b"))
    assert first.asking_prompts == ("p", "g", "q", "r")
    assert second.key == "the capital of france is"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: broken JSON"),
        (b"[]", "line 2: .*object"),
        (b'{"prompt": "p"}', "line 2: target is missing .there are prompt."),
        (b'{"prompt": "p", "target": ""}', "line 2: target: .*must not be empty"),
        (b'{"prompt": " ", "target": "t"}', "line 2: prompt: .*must not be empty"),
        (b'{"prompt": "p", "target": 3}', "line 2: target: .*valid string"),
        (b'{"prompt": "p", "target": "t", "paraphrases": 3}', "line 2: paraphrases: .*array"),
        (b'{"prompt": "p", "target": "t", "paraphrases": [""]}', "line 2: paraphrases 1: .*must not be empty"),
        (
            b'{"prompt": "p", "target": "t", "locality": [{"prompt": "a"}]}',
            "line 2: locality 1, target: Field required",
        ),
        (b'{"prompt": "p", "target": "t", "id": 1.5}', "line 2: id"),
        (b'{"prompt": ["p", "q"], "target": "t", "paraphrases": ["r"]}', "line 2: .*pair of texts and 'r' is one text"),
        (
            b'{"prompt": "p", "target": "t", "near": [{"prompt": ["q", "r"], "target": "t"}]}',
            "line 2: .* a pair of texts",
        ),
        (
            b'{"prompt": "p", "target": "t", "given_paraphrases": ["q", "r"], "paraphrases": ["s", "r"]}',
            "line 2: .*'r' is in given_paraphrases and in paraphrases, .*leave it in one of them",
        ),
        (
            b'{"messages": [{"role": "user", "content": "p"}], "target": "t", "given_paraphrases": ["q"],'
            b' "unseen_paraphrases": [[{"role": "user", "content": "q"}]]}',
            "line 2: .*'user: q' is in given_paraphrases and in unseen_paraphrases",
        ),
        (b'{"prompt": "caf\xe9", "target": "t"}', "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_malformed_line_is_named(line, message, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_bytes(GOOD.encode() + b"\n" + line)
    with pytest.raises(RequestError, match=message):
        read_requests(file)


@pytest.mark.parametrize(
    ("more", "meant"),
    [
        ('"paraphrase": ["q"]', "'paraphrase' is no key of a request; did you mean 'paraphrases'"),
        ('"Near": []', "'Near' is no key of a request; did you mean 'near'"),
        ('"unseen-paraphrases": ["q"]', "did you mean 'unseen_paraphrases'"),
        ('"subjcet": "q"', "did you mean 'subject'"),
        ('"near": [{"prompt": "q", "target": "r"}, {"prompt": "q", "target": "r", "knid": "a"}]',
         "near 2: 'knid' is no key of a request; did you mean 'kind'"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused(more, meant, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text(f'{GOOD}\n{{"prompt": "p", "target": "t", {more}}}\n')
    with pytest.raises(RequestError, match=rf"line 2: .*{re.escape(meant)}"):
        read_requests(file)


def test_a_misspelt_key_is_refused_in_python():
    with pytest.raises(ValueError, match="'paraphrase' is no key of a request; did you mean 'paraphrases'"):
        EditRequest(prompt="p", target="t", paraphrase=("q",))
    with pytest.raises(ValueError, match="'separater' is no key of a request; did you mean 'separator'"):
        Probe(prompt="p", target="t", separater=" ")
    assert Probe(prompt="p", target="t", kind="a", relation="b").model_extra == {"kind": "a", "relation": "b"}


def test_keys_of_the_caller_s_own_are_kept(tmp_path):
    own = {"relation": "P36", "idx": 3, "year": 1990, "subject_id": 7, "kind": "a", "context": "c", "aliases": ["x"]}
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": "p", "target": "t", **own}))
    (request,) = read_requests(file)
    assert request.model_extra == own


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(RequestError, match="No such file"):
        read_requests(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(RequestError, match="holds no request"):
        read_requests(tmp_path / "empty.jsonl")
    with pytest.raises(RequestError, match="no split 'tset'; it has atlas:train"):
        read_source("atlas:tset")


def test_a_text_is_read_as_passages(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One.\nStill one.\n\n\n\nTwo.\n", encoding="utf-8")
    assert [passage.strip() for passage in read_text(file)] == ["One.\nStill one.", "Two."]
    for content, message in ((b"\n \n", "no text"), (b"\xff\xfe", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read_text(file)
    with pytest.raises(RequestError, match="cannot be read"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(RequestError, match=r"cannot be read as plain UTF-8 text .*null"):
        read_text(tmp_path / "a\0b.txt")
