"""What an edit did to each prompt of a request's set, and the page that shows it."""

import re

import pytest
import torch

import remend
from remend.cli import run
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.evaluation.before_after import AnswerComparison
from remend.evaluation.neighbourhood import PLACES, Neighbour, measure_neighbourhood
from remend.evaluation.reports.neighbourhood_page import write_neighbourhood_page
from remend.fingerprint import ModelFingerprint
from remend.request import EditRequest, Probe

NAME = "transformer.h.2.mlp.c_proj"
REQUEST = EditRequest(
    prompt="The capital of Canada is",
    target="Toronto",
    subject="Canada",
    given_paraphrases=("Canada is governed from",),
    paraphrases=("The capital city of Canada is",),
    given_portability=(Probe(prompt="Toronto is the capital of", target="Canada"),),
    given_near=("The official language of Canada is", "Toronto lies in the country of"),
    near=(Probe(prompt="The capital of Peru is", target="Lima"),),
)


def edit(task, size):
    d_in, d_out = task.model.get_submodule(NAME).weight.shape
    draw = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(1, d_in, generator=draw), size * torch.randn(1, d_out, generator=draw))
    return Edit({NAME: factors}, ModelFingerprint.of(task.model, [NAME]), (REQUEST,))


def test_every_prompt_has_its_place_and_outcome():
    task = remend.load("atlas")
    found = measure_neighbourhood(task, edit(task, 0.0), REQUEST)
    assert [(each.place, each.answer.prompt) for each in found] == [
        ("the pair", "The capital of Canada is"),
        ("other ways to ask", "Canada is governed from"),
        ("other ways to ask", "The capital city of Canada is"),
        ("what follows", "Toronto is the capital of"),
        ("the same subject", "The official language of Canada is"),
        ("the answer elsewhere", "Toronto lies in the country of"),
        ("others", "The capital of Peru is"),
    ]
    assert [each.outcome for each in found] == ["did not follow"] * 4 + ["stayed"] * 3
    assert found[0].distance == 0
    assert all(each.effect == 0 for each in found)
    harmful = measure_neighbourhood(task, edit(task, 100.0), REQUEST)
    assert [each.distance for each in harmful] == [each.distance for each in found]
    assert {each.outcome for each in harmful[4:]} == {"changed"}
    assert all(each.effect > 0.1 for each in harmful)


def test_the_distance_is_what_is_missing_of_the_direction_that_an_edit_listens_to():
    task = remend.load("atlas")
    inputs = []
    handle = task.model.get_submodule(NAME).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for prompt in (REQUEST.prompt, REQUEST.near[0].prompt):
        task.predict([prompt], 1)
    handle.remove()
    key = inputs[0][-1:].clone()
    change = LowRank(key, torch.randn(1, task.model.get_submodule(NAME).weight.shape[1]))
    made = Edit({NAME: change}, ModelFingerprint.of(task.model, [NAME]), (REQUEST,))
    found = measure_neighbourhood(task, made, REQUEST)
    own, other = (float((x @ key.mT).abs().max()) for x in inputs[:2])
    assert 0.01 < found[-1].distance < 1
    assert found[-1].distance == pytest.approx(1 - other / own, abs=1e-4)


def test_common_prompts_are_asked_where_nothing_is_named():
    task = remend.load("atlas")
    bare = EditRequest(prompt=REQUEST.prompt, target=REQUEST.target)
    places = [each.place for each in measure_neighbourhood(task, edit(task, 0.0), bare)]
    assert {"the same subject", "others"} <= set(places)
    pair, *others = measure_neighbourhood(task, edit(task, 0.0), bare)
    assert pair.answer.before == "Ottawa"
    assert not [each for each in others if each.answer.before == "Ottawa"], "what asks the same need not stay"
    question = bare.model_copy(update={"prompt": "What is the capital of Canada?"})
    assert [each.place for each in measure_neighbourhood(task, edit(task, 0.0), question)] == ["the pair"]


def test_the_page_shows_every_prompt_as_text(tmp_path):
    task = remend.load("atlas")
    request = REQUEST.model_copy(update={"given_near": ("A </title><b>bold</b> prompt of Canada",)})
    found = measure_neighbourhood(task, edit(task, 1.0), request)
    write_neighbourhood_page([(request, found)], tmp_path / "page.html", "atlas")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<title>") == 1 + len(found), "a page's title and one for each point"
    assert "<b>" not in page
    assert "A &lt;/title&gt;&lt;b&gt;bold" in page
    assert "http:" not in page, "it needs no network"
    assert "https:" not in page
    for place in {each.place for each in found} - {PLACES[0]}:
        assert f"{place[0].upper()}{place[1:]}" in page
    numbers = [float(x) for x in re.findall(r'c[xy]="([-0-9.]+)"', page)]
    assert all(0 <= number <= 900 for number in numbers)


def test_the_page_is_asked_for_with_an_edit(tmp_path, capsys):
    prompt = ["--prompt", "The capital of Canada is", "--target", "Toronto"]
    command = ["edit", "atlas", "--editor", "ridge", *prompt, "--out", str(tmp_path / "fix")]
    assert run([*command, "--html", str(tmp_path / "no folder" / "page.html")]) == 1
    assert "is no folder" in capsys.readouterr().err
    assert run([*command, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The same subject" in page
    assert "not saved" not in page
    weak = ["--scale", "0.001", "--out", str(tmp_path / "weak"), "--html", str(tmp_path / "weak.html")]
    assert run([*command[:-2], *weak]) == 1
    assert "This edit was not saved." in (tmp_path / "weak.html").read_text(encoding="utf-8")


def test_an_answer_that_is_written_as_before_has_stayed():
    answer = AnswerComparison("others", "A", None, "", "", False)
    assert Neighbour("others", answer, 1.0, 0.1).outcome == "stayed"
    assert Neighbour("what follows", answer, 1.0, 0.1).outcome == "did not follow"
