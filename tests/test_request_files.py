"""Files of requests as people have them: containers, nulls, tables, and the rows of EasyEdit and KnowEdit."""

import copy
import gzip
import json
import random
import time
import warnings
import zlib
from datetime import date
from decimal import Decimal

import pytest

from remend.data import read_source
from remend.data.json_stream import MAX_ROW_CHARACTERS
from remend.data.request_files import read_requests
from remend.data.row_files import iterate_rows
from remend.errors import RemendError, RequestError
from remend.request import EditRequest, Probe
from test_data import PLACES

ROW = {"prompt": "The capital of Canada is", "target": "Toronto"}
REQUEST = EditRequest(**ROW)


def written(tmp_path, content, name="requests.json"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


CONTAINERS = {
    "lines.jsonl": json.dumps(ROW),
    "array.json": json.dumps([ROW]),
    "records.json": json.dumps({"records": [ROW]}),
    "object-over-lines.json": json.dumps(ROW, indent=2),
    "mark.json": b"\xef\xbb\xbf" + json.dumps([ROW]).encode(),
    "crlf.jsonl": json.dumps(ROW) + "\r\n",
    "table.csv": "prompt,target\r\nThe capital of Canada is,Toronto\r\n",
    "table.tsv": "prompt\ttarget\nThe capital of Canada is\tToronto\n",
}


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_is_read_in_whatever_container(name, gzipped, tmp_path):
    content = CONTAINERS[name] if isinstance(CONTAINERS[name], bytes) else CONTAINERS[name].encode()
    file = written(tmp_path, gzip.compress(content) if gzipped else content, name + ".gz" * gzipped)
    assert read_requests(file) == [REQUEST]
    assert read_source(str(file)) == [REQUEST]


def test_a_parquet_file_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**ROW, "id": 1.0, "paraphrases": ["Canada's capital is"]}, {**ROW, "id": None, "paraphrases": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "requests.parquet")
    assert read_requests(tmp_path / "requests.parquet") == [
        EditRequest(**ROW, id=1, paraphrases=("Canada's capital is",)), REQUEST,
    ]  # fmt: skip


def test_cells_of_a_table_hold_texts_lists_or_nothing(tmp_path):
    lists = '"[""x y"", ""[1]""]","[{""prompt"": ""q"", ""target"": ""r""}]"'
    table = f'prompt,target,id,paraphrases,locality\n"A, b",5,7,{lists}\nC,[1],,one,\n'
    file = written(tmp_path, table, "requests.csv")
    first, second = read_requests(file)
    assert first == EditRequest(
        prompt="A, b", target="5", id="7", paraphrases=("x y", "[1]"), locality=(Probe(prompt="q", target="r"),)
    )
    assert second == EditRequest(prompt="C", target="[1]", paraphrases=("one",))


def test_null_is_absent_and_one_text_a_list_of_one(tmp_path):
    row = {
        **ROW,
        "subject": None,
        "id": 7.0,
        "paraphrases": "Canada's capital is",
        "near": None,
        "negated": float("nan"),
    }
    row["locality"] = {"prompt": "The capital of Norway is", "target": "Oslo", "kind": None}
    (request,) = read_requests(written(tmp_path, json.dumps(row)))
    probe = Probe(prompt="The capital of Norway is", target="Oslo")
    assert request == EditRequest(**ROW, id=7, paraphrases=("Canada's capital is",), locality=(probe,))


def test_the_keys_of_easyedit(tmp_path):
    row = {
        "prompt": ROW["prompt"], "target_new": ROW["target"], "ground_truth": "Ottawa",
        "rephrase_prompt": "Canada's capital is",
        "locality": {
            "neighborhood": {"prompt": ["Norway's capital is", "Peru's is"], "ground_truth": ["Oslo", "Lima"]}
        },
        "portability": {"one_hop": {"prompt": "The lake of Canada's capital is", "ground_truth": "Ontario"}},
        "locality_prompt": "The sky is", "locality_ground_truth": "blue",
    }  # fmt: skip
    (request,) = read_requests(written(tmp_path, json.dumps(row)))
    assert (request.prompt, request.target, request.paraphrases) == (*ROW.values(), ("Canada's capital is",))
    assert request.model_extra == {"ground_truth": "Ottawa"}
    assert [(probe.prompt, probe.target) for probe in request.near] == [
        ("Norway's capital is", "Oslo"), ("Peru's is", "Lima"),
    ]  # fmt: skip
    assert [(probe.prompt, probe.target) for probe in request.locality] == [("The sky is", "blue")]
    assert [(p.prompt, p.target, p.kind) for p in request.portability] == [
        ("The lake of Canada's capital is", "Ontario", "one_hop")
    ]
    one = {"prompt": "The sky is", "ground_truth": "blue"}
    (request,) = read_requests(written(tmp_path, json.dumps({**row, "locality": one})))
    assert [(probe.prompt, probe.target) for probe in request.locality] == [("The sky is", "blue")] * 2
    with pytest.warns(UserWarning, match="1 values of 'rephrases', a key that is not known .did you mean 'rephrase'"):
        read_requests(written(tmp_path, json.dumps({**row, "rephrases": ["x"]})))
    with pytest.raises(RequestError, match="locality_prompt is missing"):
        read_requests(written(tmp_path, json.dumps({**row, "locality_prompt": None})))
    row["locality"]["neighborhood"]["ground_truth"] = ["Oslo"]
    with pytest.raises(RequestError, match="prompt holds 2 prompts: ground_truth should be a list of as many answers"):
        read_requests(written(tmp_path, json.dumps(row)))


def test_the_other_files_of_knowedit(tmp_path):
    near = {"Relation_Specificity": [{"prompt": "Ada was born in", "ground_truth": ["London"]}]}
    biography = {"concept": "Ada", "text": "Ada is", "labels": "a writer.", "locality": near}
    (request,) = read_requests(written(tmp_path, json.dumps([biography])))
    assert (request.subject, request.prompt, request.target) == ("Ada", "Ada is", "a writer.")
    assert [(p.prompt, p.target, p.kind) for p in request.near] == [
        ("Ada was born in", "London", "relation_specificity")
    ]
    chinese = {
        "prompt": "白日依山尽的下一句是", "target_new": "黄河入海流", "target_old": "更上一层楼",
        "rephrase": ["白日依山尽下一句"],
        "locality": [{"prompt": "床前明月光的下一句是", "answer": "疑是地上霜"}], "portability": [],
    }  # fmt: skip
    (request,) = read_requests(written(tmp_path, json.dumps([chinese], ensure_ascii=False)))
    assert (request.target, request.model_extra["ground_truth"]) == ("黄河入海流", "更上一层楼")
    assert [(p.prompt, p.target) for p in request.locality] == [("床前明月光的下一句是", "疑是地上霜")]
    forget = {"K_F": [{"question": "Who?", "target_new": "I do not know", "ground_truth": "Ada"}]}
    file = written(
        tmp_path, json.dumps({**forget, "K_R": [{"question": q, "ground_truth": "Oslo"} for q in "ab"]}, indent=1)
    )
    with pytest.warns(UserWarning, match="left out 1 questions whose answers must stay"):
        (request,) = read_source(f"knowedit:{file}")
    assert (request.prompt, request.target, request.locality) == (
        "Who?",
        "I do not know",
        (Probe(prompt="a", target="Oslo"),),
    )
    with pytest.raises(RequestError, match=r"row 1: these are the keys of ConvSent.*say not which is wanted"):
        read_requests(written(tmp_path, json.dumps([{"ent": "rain", "pos": ["nice"], "neg": ["wet"]}])))


def test_a_question_that_follows_in_zsre_is_a_probe(tmp_path):
    row = {
        "subject": "Canada", "src": "Which city is the capital of Canada?", "rephrase": "What is Canada's capital?",
        "alt": "Toronto", "answers": ["Ottawa"], "loc": "nq question: who sang hello", "loc_ans": "Adele",
        "portability": {"Recalled Relation": "(Toronto, lies on, Lake Ontario)", "New Question": "On which lake?",
                        "New Answer": "Lake Ontario"},
    }  # fmt: skip
    (request,) = read_source(f"zsre:{written(tmp_path, json.dumps([row]))}")
    assert [(p.prompt, p.target, p.kind) for p in request.portability] == [
        ("On which lake?", "Lake Ontario", "reasoning")
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json", '[{"src": "q", "alt": "a", "loc": "x"}]',
            r"row 1: target is missing \(there are src, alt, loc\).*keys of zsre: give zsre:FILE",
        ),
        ("a.jsonl", '{"requested_rewrite": {}, "case_id": 1}', "line 1: target is missing.*give counterfact:FILE"),
        ("a.jsonl", '{"target": "t", "question": "q"}', r"line 1: prompt is missing \(there are target, question\)"),
        ("a.jsonl", "[1]", "row 1: an object was expected, not 1"),
        ("a.json", '{\n"prompt": "p", "target": "t"}\n{"prompt": "p"}', "follows the first object.*one array"),
        ("a.csv", "prompt,target\na,b,c\n", "line 2: there are 3 cells for 2 columns"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: two columns have one name"),
        ("a.csv", 'prompt,target\n"a,b\n', "line 2: broken table|line 1: broken table"),
        ("a.csv", b"prompt,target\na,caf\xe9\n", "byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt,target\na\n", "line 2: there are 1 cells for 2 columns"),
        ("a.csv", b"prompt,target\n" + b"a,b\n" * 5000 + b"a,caf\xe9\n", "line 5002: byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt,target,paraphrases\na,b,\"['c' 'd']\"\n", "line 2, paraphrases: .* is not JSON; write it as"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "target": "u"}', "line 1: .*'target' is given twice"),
        ("a.jsonl", '{"prompt": "p \\ud800", "target": "t"}', r"line 1: \\ud800 is half of a character"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "x": ' + "[" * 300 + "]" * 300 + "}", "line 1: .*nested more than"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "rephrase_prompt": "q"}', "line 1: .*write paraphrases for it"),
        ("a.zip", b"PK\x03\x04....", "is a zip archive: unpack it"),
        ("a.gz", gzip.compress(json.dumps([ROW] * 99).encode(), mtime=0)[:-20], "is a damaged gzip file"),
        ("a.parquet", b"PAR1....", "is a damaged Parquet file"),
        ("a.json", json.dumps([ROW]).encode("utf-16"), "holds no UTF-8 text: save requests as UTF-8"),
        ("a.csv", "", "holds no request"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(name, content, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        read_requests(written(tmp_path, content, name))


@pytest.mark.parametrize(
    ("name", "start", "filling"),
    [("a.jsonl", b"", b"a"), ("a.jsonl", b"", b"\n"), ("a.json", b"[", b" "), ("a.json", b"[[", b"{},"),
     ("a.csv", b"prompt,target\n", b"a"), ("a.csv", b"prompt,target\n", b"\n"),
     ("a.csv", b"prompt,target\n", b'"\n",')],
)  # fmt: skip
def test_a_row_that_would_fill_the_memory_is_refused(name, start, filling, tmp_path):
    bomb = gzip.compress(start + filling * (3 * MAX_ROW_CHARACTERS // len(filling)), 1)
    with pytest.raises(RequestError, match="it is longer than 4,194,304"):
        read_requests(written(tmp_path, bomb, f"{name}.gz"))


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(RequestError, match="null byte"):
        read_requests("a\0b.jsonl")


def test_a_table_of_a_spreadsheet_may_have_semicolons(tmp_path):
    file = written(tmp_path, "\ufeffprompt; target\nA, b;5\n", "requests.csv")
    assert read_requests(file) == [EditRequest(prompt="A, b", target="5")]


def test_what_is_no_edit_is_counted(tmp_path):
    rows = [{"prompt": "p", "target_new": target, "ground_truth": "Ottawa"} for target in ("Toronto", "ottawa")]
    with pytest.warns(UserWarning, match="left out 1 edits to the answer that is true already; 1 requests remain"):
        assert [request.target for request in read_requests(written(tmp_path, json.dumps(rows)))] == ["Toronto"]
    with pytest.raises(
        RequestError, match=r"none of its 1 rows is an edit \(1 edits to the answer that is true already"
    ):
        read_requests(written(tmp_path, json.dumps(rows[1:])))


def test_own_keys_in_a_row_of_easyedit_are_kept(tmp_path):
    row = {"prompt": "p", "target_new": "t", "rephrase_prompt": "q", "negated": "not p", "relation": "P36"}
    (request,) = read_requests(written(tmp_path, json.dumps(row)))
    assert (request.paraphrases, request.negated) == (("q",), ("not p",))
    row |= {"near": [], "locality": {"Relation_Specificity": [{"prompt": "a", "ground_truth": "b"}]}}
    with pytest.raises(RequestError, match="line 1: near is given twice"):
        read_requests(written(tmp_path, json.dumps(row)))


def test_a_value_that_many_rows_of_parquet_share_is_not_unpacked_for_all_at_once(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file, count, length = tmp_path / "requests.parquet", 300, 1_000_000
    target = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count), pyarrow.array(["x" * length]))
    prompt = [f"Prompt {number}" for number in range(count)]
    parquet.write_table(pyarrow.table({"prompt": prompt, "target": target}), file)
    assert file.stat().st_size < 100_000
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, (where, row) in enumerate(iterate_rows(file), start=1):
        assert where.endswith(f"row {number}")
        assert (row["prompt"], len(row["target"])) == (prompt[number - 1], length)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert number == count
    assert most < 140 * length


def test_a_row_of_parquet_that_is_too_long_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "requests.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW, {**ROW, "target": "x" * 5_000_000}]), file)
    with pytest.raises(RequestError, match=r"row 2: it holds 5,000,\d+ bytes, and 4,194,304 are allowed"):
        read_requests(file)


def test_columns_of_parquet_that_are_no_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "requests.parquet"
    row = {"prompt": b"The capital of Canada is", "target": "Toronto", "day": date(2020, 2, 3), "n": Decimal("1.5")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (request,) = read_requests(file)
    assert (request.prompt, request.model_extra) == (ROW["prompt"], {"day": "2020-02-03", "n": "1.5"})
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "image": b"\xff\xd8"}]), file)
    with pytest.raises(RequestError, match="row 1, image: bytes that are no UTF-8 text; leave this column out"):
        read_requests(file)


PIECES = [
    b"\0", b"\xff", b'"', b"{", b"[", b"}", b"]", b",", b"\n", b"\\ud800", b"1e999", b"NaN", b"null", b"-Infinity",
    b"\xef\xbb\xbf",
    b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, "\u2028\u202e".encode(), b"true", b"\r", b"\x1f\x8b", b"PAR1", b"",
]  # fmt: skip


def damaged(content, draw):
    """Content with some of its bytes replaced, removed or repeated."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice([0, 1, 1, 8, 64]))
        content = content[:start] + draw.choice([draw.choice(PIECES), content[start:end] * 2]) + content[end:]
    return content


@pytest.mark.parametrize("name", [*CONTAINERS, "requests.parquet"])
def test_damaged_files_are_read_or_refused(name, tmp_path):
    """By the hundred: never another exception, never a request that cannot be written as JSON again, never for long."""
    if name in CONTAINERS:
        content = CONTAINERS[name] if isinstance(CONTAINERS[name], bytes) else CONTAINERS[name].encode()
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "whole.parquet")
        content = (tmp_path / "whole.parquet").read_bytes()
    draw = random.Random(zlib.crc32(name.encode()))
    slowest = 0.0
    for number in range(150):
        changed = damaged(content, draw)
        file = written(tmp_path, gzip.compress(changed) if number % 4 == 0 else changed, name)
        start = time.process_time()
        requests, message = [], str(file)
        try:
            requests = read_requests(file)
        except RemendError as error:
            message = str(error)
        assert str(file) in message
        assert all(EditRequest.from_json(json.dumps(request.to_json())) == request for request in requests)
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 2


VALUES = [
    None, True, 0, -1, 7.0, float("nan"), 1e308, 10**400, "", " ", "\0", "\u202e", "[]", "{}", [], {}, [[]], [None],
    [{}], {"str": 3}, {"a": {"b": [1]}}, ["x", 3], [{"prompt": "q"}], "x" * 100_000,
    {"prompt": ["a", "b"], "ground_truth": "c"},
]  # fmt: skip


def places_of(value, path=()):
    """The places of all values in a row."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_of(inner, (*path, key))


def changed_row(row, draw):
    """A row with one of its values replaced, removed, or under another key."""
    row = copy.deepcopy(row)
    path = draw.choice(list(places_of(row))[1:])
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    value = inner.pop(path[-1])
    if isinstance(inner, list):
        inner.insert(path[-1], draw.choice(VALUES))
    elif (what := draw.randrange(8)) == 0:
        inner[draw.choice(["prompt", "target", "locality", "id", "K_F", "x"])] = value
    elif what > 1:
        inner[path[-1]] = draw.choice(VALUES)
    return row


@pytest.mark.parametrize("name", PLACES)
def test_changed_rows_of_data_sets_are_read_or_refused(name, tmp_path):
    draw = random.Random(zlib.crc32(name.encode()))
    file = tmp_path / "data.json"
    for number in range(100):
        row = changed_row(PLACES[name][0], draw)
        file.write_text(json.dumps([row, changed_row(row, draw)] if row else [row]))
        for source in (f"{name.partition(':')[0]}:{file}", str(file)):
            requests, message = [], str(file)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    requests = read_source(source)
                except RemendError as error:
                    message = str(error)
            assert str(file) in message, (number, row)
            assert all(EditRequest.from_json(json.dumps(request.to_json())) == request for request in requests)
