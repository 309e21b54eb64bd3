"""Acceptance tests of edits: the criteria, the result, and the guard command."""

import json
import random
from dataclasses import replace

import pytest
import torch

import families
import remend
import worlds
from remend.apps.acceptance import (
    STANDARD_CRITERIA,
    AcceptanceCriteria,
    RejectedError,
    apply_if_accepted,
    check_acceptance,
)
from remend.cli import run
from remend.edit import Edit
from remend.errors import ConfigError, EditError, FileError, RemendError, WrongBaseError
from remend.evaluation.interventions import SharedEdit
from remend.evaluation.ordinary_text import OrdinaryText
from remend.fingerprint import ModelFingerprint
from remend.request import Chat, EditRequest
from remend.tasks import wrap
from remend.tasks.base import Example

TEXT = " ".join(["The capital of France is Paris."] * 20)


@pytest.fixture(scope="module")
def atlas():
    """A task, and an edit of its model."""
    task = remend.load("atlas", "cpu")
    request = remend.read_source("atlas:validation")[3]
    return task, remend.Mend.load("atlas").edit(task, [request])


@pytest.fixture(scope="module")
def result(atlas):
    return check_acceptance(*atlas)


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_edit_that_does_what_it_must_is_accepted(atlas, result):
    assert result.ok
    assert [check.name for check in result.checks] == ["takes", "follows", "near", "far", "elsewhere", "size"]
    assert result.missing == ("perplexity",)
    request = atlas[1].requests[0]
    counts = {check.name: check.count for check in result.checks}
    assert counts["follows"] == len(request.paraphrases)
    assert counts["near"] == len(request.near)


def test_an_edit_that_ruins_the_model_is_refused_and_off_again(atlas):
    task, edit = atlas
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with pytest.raises(RejectedError, match="not accepted and is off again") as refused:
        apply_if_accepted(task, edit.scaled(8.0))
    failed = {check.name for check in refused.value.result.checks if not check.ok}
    assert {"near", "elsewhere", "size"} <= failed
    assert all(reason in str(refused.value) for reason in refused.value.result.reasons)
    assert not any(module._forward_hooks for module in task.model.modules())
    assert same(task.model, before)


def test_an_accepted_edit_is_on(atlas):
    task, edit = atlas
    request = edit.requests[0]
    handle, _ = apply_if_accepted(task, edit)
    assert remend.answers(task, [request.prompt]) == [request.target]
    handle.revert()
    assert remend.answers(task, [request.prompt]) != [request.target]


def criteria(**settings):
    return AcceptanceCriteria.model_validate_json(json.dumps(settings))


def test_what_must_change_and_what_must_stay(atlas):
    task, edit = atlas
    request = edit.requests[0]
    told = {"prompt": request.paraphrases[0], "target": request.target}
    other = {"prompt": request.locality[0].prompt, "target": request.locality[0].target}
    found = check_acceptance(task, edit, criteria(must_change=[told], must_stay=[request.locality[1].prompt, other]))
    counts = {check.name: (check.measured, check.count) for check in found.checks}
    assert counts["changes"] == (1.0, 1)
    assert counts["stays"] == (1.0, 2)
    wrong = check_acceptance(
        task,
        edit,
        criteria(must_change=[other | {"target": request.target}], must_stay=[request.prompt]),
    )
    assert {check.name for check in wrong.checks if not check.ok} == {"changes", "stays"}
    answer = next(check.failed[0] for check in wrong.checks if check.name == "stays")
    assert answer.before != answer.after


def test_what_is_asked_by_name_must_be_measured(atlas):
    """The standard passes over what there is nothing for; who asks for it is not told that it is met."""
    task, edit = atlas
    bare = replace(edit, requests=(EditRequest(prompt=edit.requests[0].prompt, target=edit.requests[0].target),))
    assert check_acceptance(task, bare).ok
    found = check_acceptance(task, bare, criteria(near=0.1, size=100.0))
    assert (found.ok, found.unmet) == (False, ("near",))
    assert found.reasons == ["near prompts stay: asked, with nothing to measure it on"]
    assert found.to_json()["unmet"] == ["near"]


def test_ordinary_text_has_a_floor(atlas, result):
    """The share that stays is measured once, and what is asked of it decides."""
    task, edit = atlas
    (check,) = (check for check in result.checks if check.name == "elsewhere")
    (found,) = OrdinaryText(task).measure(SharedEdit(task, edit))
    assert result.elsewhere == found
    assert (check.measured, check.count) == (found.stays.mean, found.choices)
    assert json.loads(json.dumps(result.to_json()))["elsewhere"]["divergence"]["mean"] == found.divergence.mean
    ruinous = edit.scaled(4.0)
    assert check_acceptance(task, ruinous, criteria(elsewhere=0.9)).elsewhere.stays.mean < 0.9
    reasons = check_acceptance(task, ruinous, criteria(elsewhere=0.9)).reasons
    assert any(reason.startswith("choices on ordinary text stay: ") for reason in reasons)
    reasons = check_acceptance(task, ruinous, criteria(elsewhere=0.1)).reasons
    assert not any(reason.startswith("choices on ordinary text stay: ") for reason in reasons)


def test_the_canary(atlas):
    task, edit = atlas
    text = [f"{probe.prompt} {probe.target}." for probe in edit.requests[0].locality] * 4
    kept = check_acceptance(task, edit, criteria(perplexity={"text": text, "most": 2.0}))
    ruined = check_acceptance(task, edit.scaled(20.0), criteria(perplexity={"text": text, "most": 2.0}))
    ratios = [next(c.measured for c in found.checks if c.name == "perplexity") for found in (kept, ruined)]
    assert 0.5 < ratios[0] < 2 < ratios[1]
    assert kept.elsewhere.given, "choices are compared on the text that is there"
    assert kept.missing == ()


def test_what_acts_already_is_what_was_before(atlas):
    """Once an edit acts, taking it on again changes nothing, so what must stay stays."""
    task, edit = atlas
    prompt = edit.requests[0].prompt
    alone = check_acceptance(task, edit, criteria(must_stay=[prompt]))
    again = check_acceptance(task, edit.scaled(0.0), criteria(must_stay=[prompt]), active=[edit])
    stayed = [next(c.ok for c in found.checks if c.name == "stays") for found in (alone, again)]
    assert stayed == [False, True]


@pytest.mark.parametrize("kind", ["t5", "bert, binary"])
def test_other_models_are_guarded_too(kind):
    task = families.task(kind)
    requests = families.requests(kind, 3)
    requests = [r for r in requests if remend.answers(task, [r.prompt]) != [r.target]]  # else there is nothing to edit
    editor = remend.editors.make("ridge", task)
    found = check_acceptance(task, editor.edit(task, requests[:1]))
    assert {"takes", "elsewhere", "size"} <= {check.name for check in found.checks}
    assert json.loads(json.dumps(found.to_json()))["ok"] == found.ok


def test_another_model_is_refused(atlas):
    other = families.task("llama")
    with pytest.raises(WrongBaseError):
        check_acceptance(other, atlas[1])


# -- the acceptance file ---------------------------------------------------------------------------------------------


def test_the_size_of_units_is_measured_only_where_it_is_asked_for():
    task = families.task("llama")
    edit = remend.editors.make("fit", task, families.TEXT).edit(task, families.requests("llama", 1))
    assert "size" in check_acceptance(task, edit).missing
    (change,) = edit.changes.values()
    largest = float(change.delta.norm() / task.model.get_submodule(next(iter(edit.changes))).weight.detach().norm())
    for bound, fits in ((largest * 1.01, True), (largest * 0.99, False)):
        (check,) = (c for c in check_acceptance(task, edit, AcceptanceCriteria(size=bound)).checks if c.name == "size")
        assert check.measured == pytest.approx(largest, rel=1e-4)
        assert check.ok == fits


def test_an_acceptance_file_reads_its_text(tmp_path):
    (tmp_path / "canary.txt").write_text(f"{TEXT}\n\n{TEXT}\n")
    file = tmp_path / "acceptance.json"
    file.write_text(
        json.dumps(
            {
                "must_stay": [
                    "a prompt",
                    {"prompt": "another", "target": "named"},
                    [{"role": "user", "content": "hi"}],
                ],
                "perplexity": {"file": "canary.txt", "most": 1.2},
                "near": 0.9,
            }
        )
    )
    found = AcceptanceCriteria.read(file)
    assert found.perplexity.text == (TEXT, TEXT)
    assert (found.near, found.far) == (0.9, STANDARD_CRITERIA.far)
    assert isinstance(found.must_stay[2], Chat)


WRONG = {
    "no file": (None, FileError, "cannot read"),
    "not JSON": ("{", FileError, "not JSON"),
    "a list": ("[]", ConfigError, "list"),
    "an unknown key": ('{"must_chance": []}', ConfigError, "did you mean 'must_change'"),
    "an unknown key within": ('{"perplexity": {"text": ["a"], "must": 2}}', ConfigError, "did you mean 'most'"),
    "a share above one": ('{"near": 1.5}', ConfigError, "near"),
    "a share that is no number": ('{"near": "all"}', ConfigError, "near"),
    "NaN": ('{"size": NaN}', FileError, "NaN is no number"),
    "a probe without an answer": ('{"must_change": [{"prompt": "a"}]}', ConfigError, "must_change"),
    "an empty prompt": ('{"must_stay": [""]}', ConfigError, "must_stay"),
    "no text": ('{"perplexity": {"most": 1.1}}', ConfigError, "give text"),
    "less than before": ('{"perplexity": {"text": ["a"], "most": 0.5}}', ConfigError, "most"),
    "a text elsewhere": ('{"perplexity": {"file": "../secret.txt"}}', FileError, "lies outside"),
    "an absolute path": ('{"perplexity": {"file": "/etc/hostname"}}', FileError, "lies outside"),
    "a text that is not there": ('{"perplexity": {"file": "none.txt"}}', FileError, "there is no"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_acceptance_file_that_is_wrong_says_how(wrong, tmp_path):
    content, kind, message = WRONG[wrong]
    (tmp_path / "secret.txt").write_text("secret")
    file = tmp_path / "inner" / "acceptance.json"
    file.parent.mkdir()
    if content is not None:
        file.write_text(content)
    with pytest.raises(kind, match=message):
        AcceptanceCriteria.read(file)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "inner" / "canary.txt").symlink_to(tmp_path / "secret.txt")
    file = tmp_path / "inner" / "acceptance.json"
    file.write_text('{"perplexity": {"file": "canary.txt"}}')
    with pytest.raises(FileError, match="lies outside"):
        AcceptanceCriteria.read(file)


def test_files_that_were_tampered_with_are_refused(tmp_path):
    """Bytes of a good file changed at random: it is read as something that is allowed, or refused in words."""
    good = json.dumps({"must_stay": ["a"], "near": 0.5, "perplexity": {"text": ["b c"], "most": 1.5}, "size": 0.5})
    draw, file, refused = random.Random(0), tmp_path / "acceptance.json", 0
    for _ in range(200):
        content = bytearray(good.encode())
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(bytes(content))
        try:
            AcceptanceCriteria.read(file)
        except RemendError as error:
            refused += str(file) in str(error)
    assert refused > 100


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_the_verdict(atlas, tmp_path, capsys):
    atlas[1].save(tmp_path / "edit")
    atlas[1].scaled(8.0).save(tmp_path / "strong")
    report = tmp_path / "verdict.json"
    assert run(["guard", "atlas", "--edit", str(tmp_path / "edit"), "--json", str(report)]) == 0
    assert "accepted" in capsys.readouterr().out
    assert json.loads(report.read_text())["ok"] is True
    assert run(["guard", "atlas", "--edit", str(tmp_path / "strong"), "--json", str(report)]) == 1
    told = capsys.readouterr().out
    assert "not accepted" in told
    assert "answers that are not what they should be" in told
    assert json.loads(report.read_text())["ok"] is False
    (tmp_path / "asked.json").write_text('{"neer": 1}')
    wrong = ["guard", "atlas", "--edit", str(tmp_path / "edit"), "--acceptance", str(tmp_path / "asked.json")]
    assert run(wrong) == 2
    assert "did you mean 'near'" in capsys.readouterr().err
    assert issubclass(RejectedError, EditError)


def chat_edit(prompts):
    """A chat model that was taught nothing, and an edit of it that changes nothing, of conversations or texts."""
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer())
    requests = tuple(EditRequest(prompt=prompt, target="Rome") for prompt in prompts)
    return task, Edit({}, ModelFingerprint.of(task.model, {}), requests)


BRIEF = {"role": "system", "content": "Be brief."}


def conversation(*texts, system=()):
    roles = ["user", "assistant"] * len(texts)
    return Chat.of([*system, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))])


@pytest.mark.parametrize(
    ("prompts", "asked"),
    [
        ([conversation("Peru ?")], ["user: Oslo ?"]),
        ([conversation("Hi", "Yes", "Peru ?", system=[BRIEF])], ["system: Be brief.\nuser: Oslo ?"]),
        ([conversation("Peru ?"), conversation("India ?")], ["user: Oslo ?"]),
        (["Peru is", conversation("India ?")], ["Oslo ?", "user: Oslo ?"]),
        (["Peru is"], ["Oslo ?"]),
        ([], ["Oslo ?"]),
    ],
)
def test_a_text_is_asked_in_the_form_of_the_edits_own_requests(prompts, asked):
    task, edit = chat_edit(prompts)
    said = {"prompt": "Oslo ?", "target": "Delhi"}
    found = check_acceptance(task, edit, criteria(must_change=[said], must_stay=[said]), max_new_tokens=4)
    checks = {check.name: check for check in found.checks}
    assert [answer.prompt for answer in checks["changes"].failed] == asked
    assert [answer.prompt for answer in checks["stays"].failed] == asked


def test_an_empty_answer_is_not_kept():
    task, edit = chat_edit([conversation("Peru ?")])
    worlds.teach(task, task.collate([Example(task.encode_input(conversation("Oslo ?")), (task.chat.end,))]))
    assert remend.answers(task, [conversation("Oslo ?")]) == [""]
    found = check_acceptance(task, edit, criteria(must_stay=["Oslo ?"]))
    (check,) = (check for check in found.checks if check.name == "stays")
    assert (check.ok, check.measured) == (False, 0)
