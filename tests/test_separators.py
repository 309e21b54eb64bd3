"""What stands between a prompt and its answer: what the model expects, or what the request says."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import tokenizers_of
import worlds
from remend.cli import run
from remend.data.request_files import read_requests
from remend.edit import Edit
from remend.editors import make
from remend.errors import FileError, RequestError
from remend.request import Completion, EditRequest, Probe, parse_request, write_requests
from remend.tasks import wrap
from remend.training.episodes import Episodes
from tokenizers_of import CAUSAL

TEXTS = {  # script: a prompt, a target, and what a reader puts between them
    "Latin": ("The capital of France is", "Paris", " "),
    "Cyrillic": ("Столица Франции —", "Париж", " "),
    "Greek": ("Η πρωτεύουσα είναι", "Παρίσι", " "),
    "Arabic": ("عاصمة فرنسا هي", "باريس", " "),
    "Hebrew": ("בירת צרפת היא", "פריז", " "),
    "Devanagari": ("राजधानी है", "पेरिस", " "),
    "Korean": ("프랑스의 수도는", "파리", " "),
    "Chinese": ("法国的首都是", "巴黎", ""),
    "Japanese": ("日本の首都は", "東京", ""),
    "Thai": ("เมืองหลวงคือ", "ปารีส", ""),
    "quotation": ('He said: "', 'yes"', ""),
    "elision": ("un pays d'", "Europe", ""),
    "address": ("See https://", "www.w3.org", ""),
    "sum": ("1+1=", "2", ""),
}
BYTES = [habit for habit in CAUSAL if "unigram" not in habit]


def task_for(habit):
    tokenizer = tokenizers_of.tokenizer(habit)
    torch.manual_seed(0)
    task = wrap(families.LANGUAGE_MODELS["llama"](), tokenizer)
    task.model.resize_token_embeddings(len(tokenizer))
    return wrap(worlds.llama(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer)


def expecting(task, shares):
    """Have the model expect, after every text, tokens with some probabilities; count the passes that end at prompts."""
    passes = []

    def outputs(batch):
        if len(batch.target) == batch.rows:  # others ask whether the model knows the prompts
            passes.append(batch.rows)
        logits = torch.full((len(batch.target), len(task.tokenizer)), -1e9)
        for token, share in shares.items():
            logits[:, token] = torch.tensor(share).log()
        return logits

    task.outputs = outputs
    return passes


def first_tokens(task, target):
    """The first token of a target after a space, and without one, where a letter stands before."""
    before = task.ids("a", False)
    spaced, bare = (task.ids("a" + between + target, False)[len(before)] for between in (" ", ""))
    return spaced, bare


@pytest.mark.parametrize("script", TEXTS)
@pytest.mark.parametrize("habit", BYTES)
def test_the_models_own_next_token_decides(habit, script):
    prompt, target, between = TEXTS[script]
    task = task_for(habit)
    spaced, bare = first_tokens(task, "b" if script in ("quotation", "elision", "address", "sum") else target)
    passes = expecting(task, {spaced: 0.97, bare: 0.01} if between else {spaced: 0.01, bare: 0.97})
    pair = task.encode(prompt, target)
    assert task.separator(prompt) == between
    assert task.decode_tokens((*pair.input, *pair.target), True).lstrip(" ") == prompt + between + target
    assert pair.input == task.encode_input(prompt)
    assert task.decode(pair.target) == target
    assert passes == [1], "a prompt is decided once"
    for said in ("", " ", "\n"):  # the request's own overrides it
        own = task.encode(Completion(prompt, said), target)
        assert own.input == pair.input
        assert task.decode_tokens((*own.input, *own.target), True).lstrip(" ") == prompt + said + target
    assert passes == [1]


def test_many_prompts_are_decided_together():
    task = task_for("byte-level")
    spaced, bare = first_tokens(task, "b")
    passes = expecting(task, {spaced: 0.01, bare: 0.9})
    prompts = [f"{number}+1=" for number in range(70)]
    task.choose_answer_forms([*prompts, *prompts, "line\n", Completion("x=", " "), "  "])
    assert sum(passes) == 71
    assert len(passes) == 2
    assert {task.separator(prompt) for prompt in prompts} == {""}
    assert sum(passes) == 71


def test_training_asks_the_model_about_a_sample():
    task = task_for("byte-level")
    spaced, bare = first_tokens(task, "b")
    passes = expecting(task, {spaced: 0.01, bare: 0.9})
    prompts = [f"{number}{end}" for number in range(70) for end in ("+1=", " is", " -")]
    episodes = Episodes(task, [EditRequest(prompt=p, target="b", subject=p) for p in prompts], 0)
    assert sum(passes) == 3 * 24  # every third of each ending
    assert all(episode.edit == task.encode(p, "b") for p, episode in zip(prompts, episodes.episodes, strict=True))
    assert sum(passes) == len(prompts), "what was not asked is decided by itself afterwards"


def test_where_prompts_that_end_alike_differ_training_asks_about_all():
    task = task_for("byte-level")
    spaced, bare = first_tokens(task, "b")
    (seven,) = task.ids("7", False)

    def outputs(batch):
        logits = torch.zeros((batch.rows, len(task.tokenizer)))
        logits[:, bare] = 9.0
        logits[batch.inputs["input_ids"][:, 0] == seven, spaced] = 99.0
        return logits

    task.outputs = outputs
    prompts = [f"{number}+1=" for number in range(70, 150)]
    between = task.sample_separators(prompts)
    assert between == {prompt: " " if prompt[0] == "7" else "" for prompt in prompts}


@settings(deadline=None, max_examples=30)
@given(text=st.sampled_from([prompt for prompt, _, _ in TEXTS.values()]), indent=st.sampled_from(["  ", "    ", "\t"]))
@pytest.mark.parametrize("habit", BYTES)
def test_indentation_is_kept(habit, text, indent):
    task = task_for(habit)
    pair = task.encode(f"{text}:\n{indent}", "return 42")
    assert task.decode_tokens(pair.input, True).lstrip(" ") == f"{text}:\n{indent}"
    assert task.decode_tokens((*pair.input, *pair.target), True).lstrip(" ") == f"{text}:\n{indent}return 42"
    assert task.encode_input(f" {text} ") == task.encode_input(text)


def test_where_words_do_not_come_next_a_space_stands():
    task = task_for("byte-level")
    (stop,) = task.ids(".", False)
    expecting(task, {stop: 0.9, task.tokenizer.eos_token_id: 0.1})
    assert task.separator("The capital of France is Paris") == " "
    expecting(task, dict.fromkeys(range(len(task.tokenizer)), float("nan")))
    assert task.separator("Oslo -") == " "


def test_a_word_that_goes_on_tells_little_of_another_word():
    task = task_for("byte-level")
    spaced, bare = first_tokens(task, "b")
    expecting(task, {spaced: 0.02, bare: 0.9})
    assert task.separator("The mother of Beyonc") == " "
    assert task.separator("The mother of (") == ""
    expecting(task, {bare: 0.9})
    assert task.separator("ACGTTG") == "", "a model that never writes a space"


# -- requests and edits --------------------------------------------------------------------------------------------


def test_a_request_says_what_separates(tmp_path):
    line = {"prompt": "1+1=", "target": "2", "separator": "", "paraphrases": ["2-0="], "formats": ["Sum?"]}
    line |= {"near": [{"prompt": "1+2=", "target": "3", "separator": "\n"}, {"prompt": "a", "target": "b"}]}
    request = parse_request(json.dumps(line), "here")
    prompts = (request.prompt, request.paraphrases[0], request.formats[0], request.near[0].prompt)
    assert [prompt.separator for prompt in prompts] == ["", "", "", "\n"]
    assert not isinstance(request.near[1].prompt, Completion)
    assert request.prompt == "1+1="
    assert {request.prompt: 1} == {"1+1=": 1}
    for again in (copy.deepcopy(request.prompt), pickle.loads(pickle.dumps(request.prompt))):
        assert (again, again.separator) == ("1+1=", "")
    write_requests(tmp_path / "requests.jsonl", [request])
    assert read_requests(tmp_path / "requests.jsonl") == [request]
    assert json.loads((tmp_path / "requests.jsonl").read_text()) == line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"separator": "  "}, "separator"),
        ({"separator": 1}, "separator"),
        ({"separator": "", "prompt": ["a", "b"]}, "prompt: .*leave it away where the prompt is a conversation"),
        ({"separator": "", "messages": [{"role": "user", "content": "?"}]}, "leave it away"),
    ],
)
def test_separators_that_are_none_are_refused(given, said):
    line = {"prompt": "a", "target": "b", **given}
    if "messages" in given:
        del line["prompt"]
    with pytest.raises(RequestError, match=said):
        parse_request(json.dumps(line), "line 1")


@pytest.mark.parametrize("family", ["t5", "bert, binary"])
def test_models_that_answer_beside_the_prompt_take_none(family):
    task = families.task(family)
    target = families.requests(family, 1)[0].target
    assert task.separator("Oslo is") is None
    with pytest.raises(RequestError, match="separator belongs to models that continue"):
        task.encode(Completion("Oslo is", ""), target)


def test_an_edit_records_what_separated(tmp_path):
    task = wrap(worlds.llama(), worlds.tokenizer())
    requests = [
        EditRequest(prompt="Oslo is", target="Rome", separator="\n"),
        EditRequest(prompt="Lima is", target="Bern"),
    ]
    ridge = make("ridge", task)
    edit = ridge.edit(task, requests)
    assert edit.separators == ("\n", " ")
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.separators == edit.separators
    assert loaded.requests[0].prompt.separator == "\n"
    each = ridge.edit_each(task, requests)
    assert [part.separators for part in each] == [("\n",), (" ",)]
    assert (each[0] + each[1]).separators == ("\n", " ")
    assert (Edit(each[0].changes, each[0].base, (requests[0],)) + each[1]).separators == (None, " ")
    plain = ridge.edit(task, [EditRequest(prompt="Oslo is", target="Rome")])
    assert not all(torch.equal(plain.changes[name].u, each[0].changes[name].u) for name in plain.changes)


def test_manifests_with_other_separators_are_refused(tmp_path):
    task = wrap(worlds.llama(), worlds.tokenizer())
    edit = make("ridge", task).edit(task, [EditRequest(prompt="Oslo is", target="Rome")])
    for number, wrong in enumerate([("-",), (" ", " ")]):
        object.__setattr__(edit, "separators", wrong)
        edit.save(tmp_path / str(number))
        with pytest.raises(FileError, match="separators should hold one for each request"):
            Edit.load(tmp_path / str(number))


def test_the_commands_take_and_show_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    edit = ["edit", "atlas", "--prompt", "The capital of Canada is", "--target", "Toronto", "--json", "edit.json"]
    edit += ["--keep-failed"]  # the model has never written a line break
    assert run([*edit, "--out", "own", "--separator", "newline"]) == 0
    assert "between prompt and target: a line break" in capsys.readouterr().out
    assert json.loads((tmp_path / "edit.json").read_text())["separators"] == ["\n"]
    assert run(["show", "own", "--json", "show.json"]) == 0
    assert "(after a line break)" in capsys.readouterr().out
    assert json.loads((tmp_path / "show.json").read_text())["separators"] == ["\n"]
    assert Edit.load(tmp_path / "own").requests[0].separator == "\n"
    assert run([*edit, "--out", "other", "--separator", "-"]) == 2
    assert "--separator is none, space or newline" in capsys.readouterr().err
    assert Probe(prompt="a", target="b").separator is None
