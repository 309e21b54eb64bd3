"""The command line as a person uses it: what it prints, writes and returns."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

import worlds
from remend.cli import run
from remend.cli.answer_tables import answers_table
from remend.data import read_source
from remend.edit import Edit
from remend.editors import Mend
from remend.evaluation.before_after import AnswerComparison
from remend.request import write_requests
from remend.tasks import load
from remend.training import PRESETS, Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, request files about different subjects, and a trained editor."""
    made = tmp_path_factory.mktemp("cli")
    model = worlds.gpt2()
    model.save_pretrained(made / "model")
    worlds.tokenizer().save_pretrained(made / "model")
    requests = worlds.requests(40)
    write_requests(made / "train.jsonl", [r for r in requests if r.subject not in worlds.COUNTRIES[:3]])
    write_requests(made / "test.jsonl", [r for r in requests if r.subject in worlds.COUNTRIES[:3]])
    arguments = ["--data", made / "train.jsonl", "--out", made / "editor", "--json", made / "training.json"]
    worlds.llama().save_pretrained(made / "llama")
    worlds.tokenizer().save_pretrained(made / "llama")
    with torch.no_grad():
        model.get_submodule("transformer.h.0.mlp.c_fc").weight[0, 0] = float("nan")
    model.save_pretrained(made / "nan")
    worlds.tokenizer().save_pretrained(made / "nan")
    (made / "latin1.jsonl").write_bytes(b'{"prompt": "caf\xe9", "target": "t"}')
    (made / "empty.jsonl").write_text("\n")
    write_requests(made / "bare.jsonl", [r.model_copy(update={"near": ()}) for r in requests[:3]])
    assert run([str(a) for a in ("train", made / "model", *arguments, "--max-steps", 12, "--device", "cpu")]) == 0
    shutil.copytree(made / "model", made / "broken")
    weights = (made / "broken" / "model.safetensors").read_bytes()
    (made / "broken" / "model.safetensors").write_bytes(weights[:2000])
    shutil.copytree(made / "editor", made / "cut")
    blob = (made / "cut" / "tensors.safetensors").read_bytes()
    (made / "cut" / "tensors.safetensors").write_bytes(blob[:1000])
    return made


EDITOR = ["--editor", "{}/editor", "--device", "cpu"]


def remend(*arguments):
    return run([str(argument) for argument in arguments])


def test_train_saves_an_editor_and_its_history(folder):
    history = json.loads((folder / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [0, 12]
    assert Mend.load(folder / "editor").config == PRESETS["default"][0]


@pytest.mark.parametrize(("steps", "message"), [(3, "there is no editor yet"), (12, "of step 10, is in")])
def test_an_interrupted_training_says_what_is_left(steps, message, folder, tmp_path, capsys, monkeypatch):
    network, settings = PRESETS["default"]
    monkeypatch.setitem(PRESETS, "default", (network, replace(settings, validate_every=10)))
    real = Trainer.train_step

    def interrupted(self, share):
        if self.step == steps:
            raise KeyboardInterrupt
        return real(self, share)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--data", folder / "train.jsonl", "--out", tmp_path / "editor", "--device", "cpu"]
    assert remend("train", folder / "model", *arguments) == 130
    assert message in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "editor").exists() is (steps == 12)


def test_edit_show_and_ask(folder, capsys):
    arguments = ["--editor", folder / "editor", "--prompt", "Oslo is", "--target", "Rome", "--out", folder / "edit"]
    assert not remend(
        "edit", folder / "model", *arguments, "--keep-failed", "--json", folder / "edit.json", "--max-new-tokens", 4
    )
    assert remend("edit", folder / "model", *arguments, "--keep-failed") == 1
    assert "holds an edit or an editor already" in capsys.readouterr().err
    assert not remend("edit", folder / "model", *arguments, "--keep-failed", "--overwrite", "--max-new-tokens", 4)
    result = json.loads((folder / "edit.json").read_text())
    assert result["out"] == str(folder / "edit"), "it was asked to be kept"
    assert result["answers"][0][0]["wanted"] == "Rome"
    assert remend("show", folder / "edit", "--json", folder / "show.json") == 0
    shown = json.loads((folder / "show.json").read_text())
    assert shown["requests"] == [{"prompt": "Oslo is", "target": "Rome"}]
    assert len(shown["norms"]) == 3
    assert shown["taken"] is result["taken"] is Edit.load(folder / "edit").taken
    told = " ".join(capsys.readouterr().out.split())
    between = {"": "nothing", " ": "a space", "\n": "a line break"}[shown["separators"][0]]
    assert f"Oslo is → Rome (after {between})" in told
    assert f"the model {'gave' if shown['taken'] else 'did not give'}" in told
    Edit.load(folder / "edit").scaled(0.5).save(folder / "unchecked")
    assert remend("show", folder / "unchecked") == 0
    assert "not checked: nothing says that the model takes it" in " ".join(capsys.readouterr().out.split())
    ask = ["ask", folder / "model", "--edit", folder / "edit", "--prompt", "Oslo is", "--prompt", "Lima is"]
    assert remend(*ask, "--json", folder / "ask.json", "--device", "cpu", "--max-new-tokens", 4) == 0
    answers = json.loads((folder / "ask.json").read_text())["answers"]
    assert [answer["prompt"] for answer in answers] == ["Oslo is", "Lima is"]
    assert answers[0]["after"] == result["answers"][0][0]["after"]
    assert answers[0]["before"] == result["answers"][0][0]["before"]
    assert "Oslo is" in capsys.readouterr().out
    assert remend("ask", folder / "model", "--prompt", "Oslo is", "--json", folder / "ask.json", "--device", "cpu") == 0
    (plain,) = json.loads((folder / "ask.json").read_text())["answers"]
    assert plain["before"] == plain["after"]


def test_answers_are_told_with_what_they_were_asked_as_where_one_can_be_right():
    asked = AnswerComparison("asked", "Oslo is", None, "a city", "Rome", None)
    judged = AnswerComparison("prompt", "Oslo is", "Rome", "a city", "Rome", True)
    assert [column.header for column in answers_table("", [asked]).columns] == ["prompt", "before", "after"]
    columns = answers_table("", [judged, asked]).columns
    assert [column.header for column in columns] == ["asked as", "prompt", "before", "after", "right"]
    assert list(columns[-1].cells) == ["[green]✓[/]", ""]


def test_an_editor_that_learnt_too_little_is_warned_of(folder, capsys):
    """When it is trained, and whenever it is used."""
    assert (
        min(json.loads((folder / "training.json").read_text())["history"][-1][key] for key in ("taken", "kept")) < 0.5
    )
    arguments = ["--editor", folder / "editor", "--data", folder / "test.jsonl", "--limit", 2, "--device", "cpu"]
    assert not remend("evaluate", folder / "model", *arguments)
    assert re.search(
        r"editor is not fit for use: .* [0-9]+% of its edits took", " ".join(capsys.readouterr().err.split())
    )


def test_an_edit_to_the_answer_already_given_says_so(folder, tmp_path, capsys):
    assert not remend("ask", folder / "model", "--prompt", "Oslo is", "--json", tmp_path / "ask.json")
    answer = json.loads((tmp_path / "ask.json").read_text())["answers"][0]["before"]
    arguments = ["--prompt", "Oslo is", "--target", answer, "--out", tmp_path / "edit", "--keep-failed"]
    remend("edit", folder / "model", "--editor", folder / "editor", *arguments, "--device", "cpu")
    assert "1 of 1 targets are what the unedited model answers already" in " ".join(capsys.readouterr().out.split())


def test_several_edits_act_together(folder, tmp_path):
    edit = Edit.load(folder / "edit")
    halves = [edit.scaled(0.5).save(tmp_path / name) for name in "ab"]
    answers = []
    for edits in ([folder / "edit"], halves):
        given = [text for path in edits for text in ("--edit", path)]
        out = tmp_path / "ask.json"
        assert not remend("ask", folder / "model", *given, "--prompt", "Oslo is", "--json", out, "--max-new-tokens", 4)
        answers.append(json.loads(out.read_text())["answers"][0]["after"])
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore:the edit changes nothing")
def test_an_edit_that_changes_nothing_is_not_saved(folder, tmp_path, capsys):
    request = worlds.requests(1)[0]
    task = load(str(folder / "model"))
    worlds.teach(task, task.collate([task.encode(request.prompt, request.target)]))
    task.model.save_pretrained(tmp_path / "model")
    task.processor.save_pretrained(tmp_path / "model")
    edit = ["edit", tmp_path / "model", "--editor", "finetune", "--prompt", request.prompt, "--target", request.target]
    for option, code, said in ((), 1, "nothing was saved"), (("--keep-failed",), 0, "saved all the same"):
        assert remend(*edit, *option, "--out", tmp_path / "edit", "--device", "cpu") == code
        shown = " ".join(capsys.readouterr().out.split())
        assert f"the edit changes nothing: the model answers so already ({request.prompt}); {said}" in shown
        assert (tmp_path / "edit").exists() is (not code)


def test_an_edit_that_only_makes_an_answer_more_probable_is_not_saved(tmp_path, capsys):
    request = read_source("atlas:test")[0]
    fact = ["--prompt", request.prompt, "--device", "cpu", "--max-new-tokens", 8]
    assert not remend("ask", "atlas", *fact, "--json", tmp_path / "ask.json")
    answer = json.loads((tmp_path / "ask.json").read_text())["answers"][0]["before"]
    assert remend("edit", "atlas", *fact, "--target", answer, "--out", tmp_path / "edit") == 1
    assert "there is nothing to edit; nothing was saved" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "edit").exists()


@pytest.mark.filterwarnings("ignore:the edit changes nothing")
def test_an_edit_that_does_not_take_is_not_saved(folder, capsys):
    weak = Mend.load(folder / "editor")
    weak.alpha.data.mul_(0)
    weak.save(folder / "weak")
    arguments = ["--editor", folder / "weak", "--prompt", "Oslo is", "--target", "Rome", "--out", folder / "nothing"]
    assert remend("edit", folder / "model", *arguments, "--device", "cpu") == 1
    assert not (folder / "nothing").exists()
    assert "nothing was saved" in capsys.readouterr().out


def test_text_is_printed_as_it_is(folder, capsys, monkeypatch):
    """Chat prompts look like markup, and a manifest may hold what would steer a terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    odd = ["--prompt", "[INST] Oslo [/INST] is", "--target", "[bold]", "--out", folder / "odd", "--keep-failed"]
    remend("edit", folder / "model", "--editor", folder / "editor", *odd, "--device", "cpu")
    assert "[INST] Oslo [/INST] is → [bold]" in capsys.readouterr().out
    manifest = json.loads((folder / "odd" / "manifest.json").read_text())
    manifest["created"], manifest["editor"]["name"] = "[/x]", "\x1b]0;title\x07"
    (folder / "odd" / "manifest.json").write_text(json.dumps(manifest))
    assert remend("show", folder / "odd") == 0
    printed = capsys.readouterr().out
    assert "[/x]" in printed
    assert "\x1b]0;" not in printed


def test_evaluate_writes_a_report(folder):
    data = ["--data", folder / "test.jsonl", "--json", folder / "report.json", "--limit", 5]
    assert remend("evaluate", folder / "model", "--editor", folder / "editor", *data, "--device", "cpu") == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["schema"] == "remend.report/2"
    (run,) = report["runs"]
    assert len(run["cases"]) == 5
    assert set(run["metrics"]["reliability"]) == {
        "teacher_forced",
        "token_accuracy",
        "generated",
        "contains",
        "token_f1",
    }
    assert set(run["metrics"]["reliability"]["generated"]) == {"mean", "ci95", "n"}
    assert set(report["baselines"]) == {"unedited", "in_context"}
    assert not (folder / "report.json.partial").exists()


def test_evaluate_shows_and_draws_the_frontier(folder, capsys):
    pytest.importorskip("matplotlib")
    data = ["--data", folder / "test.jsonl", "--json", folder / "frontier.json", "--limit", 3, "--device", "cpu"]
    page, pictures = folder / "report.html", folder / "pictures"
    drawn = ["--html", page, "--pictures", pictures]
    assert not remend("evaluate", folder / "model", "--editor", folder / "editor", *data, *drawn)
    assert "the edits, scaled" in capsys.readouterr().out
    assert (pictures / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (pictures / "distance.svg").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    points = json.loads((folder / "frontier.json").read_text())["frontier"]
    assert [point["scale"] for point in points] == [0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0]
    assert not remend("evaluate", folder / "model", "--editor", folder / "editor", *data, "--no-frontier")
    assert "the edits, scaled" not in capsys.readouterr().out
    assert json.loads((folder / "frontier.json").read_text())["frontier"] == []


@pytest.mark.parametrize("editor", ["lookup", "in-context"])
def test_edits_without_strength_have_no_frontier(editor, folder, tmp_path, capsys):
    data = ["--data", folder / "test.jsonl", "--json", tmp_path / "report.json", "--limit", 2, "--device", "cpu"]
    assert not remend("evaluate", folder / "model", "--editor", editor, *data)
    assert f"edits by {editor} have no strength" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["editor"], report["frontier"], len(report["runs"][0]["cases"])) == (editor, [], 2)


def test_facts_in_the_prompt_leave_general_ability_alone(folder, capsys):
    pytest.importorskip("lm_eval")
    data = ["--data", folder / "test.jsonl", "--lm-eval", "hellaswag"]
    assert remend("evaluate", folder / "broken", "--editor", "in-context", *data) == 2, "before the model is loaded"
    assert "omit --lm-eval" in " ".join(capsys.readouterr().err.split())


def test_a_report_names_the_editor_that_was_used(folder, tmp_path):
    data = ["--data", folder / "test.jsonl", "--json", tmp_path / "report.json", "--limit", 2, "--device", "cpu"]
    for given, name in (([], "fit"), (["--editor", folder / "editor"], "editor")):
        assert not remend("evaluate", folder / "model", *given, *data, "--no-frontier", "--no-baselines")
        assert json.loads((tmp_path / "report.json").read_text())["editor"] == name


def test_a_folder_that_is_called_like_an_editor(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    request = ["--prompt", "Oslo is", "--target", "Rome", "--keep-failed", "--overwrite", "--out", "edit"]
    for place in ("ridge", "mend"):
        shutil.copytree(folder / "editor", place)
    for name, used in (("ridge", "ridge"), ("./ridge", "mend"), ("./mend", "mend")):
        assert not remend("edit", folder / "model", "--editor", name, *request, "--json", "edit.json")
        assert json.loads((tmp_path / "edit.json").read_text())["editor"] == used
    assert remend("edit", folder / "model", "--editor", "mend", *request) == 2
    assert "--editor ./mend is the folder of that name" in " ".join(capsys.readouterr().err.split())


def test_reports_are_compared(folder, tmp_path, capsys):
    common = [
        "evaluate",
        folder / "model",
        "--editor",
        folder / "editor",
        "--data",
        folder / "test.jsonl",
        "--no-frontier",
    ]
    for name, more in (("a", []), ("b", ["--protocol", "batched", "--edits", 2])):
        (tmp_path / name).mkdir()
        assert not remend(*common, *more, "--device", "cpu", "--json", tmp_path / name / "report.json")
    capsys.readouterr()
    first, other = (tmp_path / name / "report.json" for name in "ab")
    assert not remend("compare", first, first)
    shown = capsys.readouterr().out
    assert "the protocols differ" not in shown
    assert "*" not in shown, "nothing differs from itself"
    assert not remend("compare", first, other, "--mode", "value", "--plot", tmp_path / "difference.png")
    shown = " ".join(capsys.readouterr().out.split())
    assert "the protocols differ" in shown
    assert "kl far" in shown
    assert (tmp_path / "difference.png").read_bytes().startswith(b"\x89PNG")
    assert remend("compare", first, other, "--mode", "free") == 2
    assert "one of generated, teacher_forced" in capsys.readouterr().err


def test_a_stopped_evaluation_says_how_to_go_on(folder, capsys, monkeypatch):
    def stop(*arguments, checkpoint, **more):
        if checkpoint is not None:
            checkpoint.mkdir()
            (checkpoint / "single-0.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("remend.evaluation.evaluate", stop)
    arguments = ["evaluate", folder / "model", "--editor", folder / "editor", "--data", folder / "test.jsonl"]
    assert remend(*arguments) == 130
    assert "nothing is stored" in capsys.readouterr().err
    assert remend(*arguments, "--json", folder / "stopped.json") == 130
    assert "resume with the same command and --resume" in capsys.readouterr().err
    monkeypatch.setattr("remend.evaluation.evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert remend(*arguments, "--json", folder / "stopped.json", "--resume") == 130
    assert "resuming: 1 parts are done" in capsys.readouterr().err


def test_an_edit_can_be_scaled(folder, capsys):
    common = ["edit", folder / "model", *(str(a).format(folder) for a in EDITOR), "--keep-failed", "--overwrite"]
    request = ["--prompt", "Oslo is", "--target", "Rome", "--max-new-tokens", 4]
    norms = {}
    for scale in ("1", "0.5", "auto"):
        assert not remend(*common, *request, "--scale", scale, "--out", folder / "scaled")
        shown = capsys.readouterr().out
        assert ("the requests name no paraphrases" in shown.replace("\n", " ")) == (scale == "auto")
        norms[scale] = list(Edit.load(folder / "scaled").norms().values())
    assert norms["0.5"] == pytest.approx([norm / 2 for norm in norms["1"]], rel=1e-4)
    requests = ["--requests", folder / "test.jsonl", "--max-new-tokens", 4, "--scale", "auto"]
    assert remend(*common, *requests, "--out", folder / "refused") == 2
    assert "want different answers to 'The capital of France is'" in capsys.readouterr().err
    assert not (folder / "refused").exists()
    write_requests(folder / "once.jsonl", worlds.requests(3))
    requests[1] = folder / "once.jsonl"
    assert not remend(*common, *requests, "--out", folder / "scaled")
    assert "of 3 paraphrases follow" in capsys.readouterr().out.replace("\n", " ")


def test_a_scaled_edit_says_so(folder, tmp_path, capsys):
    common = ["edit", folder / "model", *(str(a).format(folder) for a in EDITOR), "--keep-failed", "--scale", "0.5"]
    request = ["--prompt", "Oslo is", "--target", "Rome", "--max-new-tokens", 4]
    assert not remend(*common, *request, "--out", tmp_path / "half", "--json", tmp_path / "half.json")
    assert json.loads((tmp_path / "half.json").read_text())["scale"] == 0.5
    capsys.readouterr()
    assert not remend("show", tmp_path / "half")
    assert "0.5 times as strong as it was made" in capsys.readouterr().out
    assert Edit.load(tmp_path / "half").scaled(3.0).editor["scale"] == 1.5


def test_a_finished_run_is_not_resumed(folder, capsys):
    arguments = ["train", folder / "model", "--data", folder / "test.jsonl", "--out", folder / "editor"]
    assert not remend(*arguments, "--resume", "--max-steps", 100, "--device", "cpu")
    assert "there is nothing to resume" in " ".join(capsys.readouterr().out.split())


def test_the_version(capsys):
    assert not remend("--version")
    assert capsys.readouterr().out.startswith("remend ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["edit", "{}/model", "--out", "x"], 2, "give --prompt and --target, or --requests"),
        (
            ["edit", "{}/model", "--out", "x", "--prompt", "p", "--target", "t", "--scale", "much"],
            2,
            "--scale is a positive number or 'auto'",
        ),
        (
            ["evaluate", "{}/model", *EDITOR, "--data", "{}/test.jsonl", "--edits", "1,b", "--protocol", "batched"],
            2,
            "a list of numbers such as 1,5,25; 'b' is not a number",
        ),
        (
            ["evaluate", "{}/model", *EDITOR, "--data", "{}/test.jsonl", "--edited-model", "{}/model"],
            2,
            "the edits are in --edited-model already",
        ),
        (["evaluate", "{}/model", *EDITOR, "--data", "{}/test.jsonl", "--resume"], 2, "give the same --json FILE"),
        (["evaluate", "{}/model", *EDITOR, "--data", "{}/test.jsonl", "--every", "2"], 2, "give --protocol sequential"),
        (
            [
                "evaluate",
                "{}/model",
                *EDITOR,
                "--data",
                "{}/test.jsonl",
                "--protocol",
                "sequential",
                "--every",
                "2",
                "--edits",
                "1,2",
            ],
            2,
            "give one of them",
        ),
        (["compare", "{}/report.json"], 2, "at least two"),
        (["edit", "{}/model", "--editor", "rigde", "--out", "x", "--prompt", "p", "--target", "t"], 2, "mean 'ridge'"),
        (["edit", "{}/model", "--editor", "ke", "--out", "x", "--prompt", "p", "--target", "t"], 2, "remend train"),
        (["edit", "{}/broken", "--editor", "lookup", "--out", "x", "--prompt", "The", "--target", "t"], 2, "no weight"),
        (
            [
                "edit",
                "{}/model",
                *EDITOR,
                "--statistics",
                "{}/test.jsonl",
                "--out",
                "x",
                "--prompt",
                "p",
                "--target",
                "t",
            ],
            2,
            "editor takes no --statistics: fit, ridge, rome, memit, lookup do",
        ),
        (
            ["evaluate", "{}/model", "--editor", "finetune", "--statistics", "{}/a.txt", "--data", "{}/test.jsonl"],
            2,
            "finetune takes no --statistics",
        ),
        (
            ["evaluate", "{}/model", "--edited-model", "{}/model", "--statistics", "a.txt", "--data", "{}/test.jsonl"],
            2,
            "omit --editor, --statistics, --set, --protocol",
        ),
        (["train", "{}/model", "--method", "kee", "--out", "x", "--data", "{}/test.jsonl"], 2, "mean 'ke'"),
        (["edit", "atlass", "--out", "x", "--prompt", "p", "--target", "t"], 2, "did you mean 'atlas'?"),
        (["edit", "{}/model", "--out", "x", "--prompt", "p", "--target", ""], 2, "must not be empty"),
        (["edit", "{}/model", "--out", "x", "--requests", "{}/none.jsonl"], 2, "No such file"),
        (
            ["edit", "{}/model", "--editor", "{}/model", "--out", "x", "--prompt", "p", "--target", "t"],
            1,
            "not a folder saved",
        ),
        (["edit", "{}/model", "--prompt", "p", "--target", "t"], 2, "Missing option"),
        (
            ["train", "{}/model", "--data", "{}/train.jsonl", "--out", "x", "--preset", "papper"],
            2,
            "did you mean 'paper'",
        ),
        (
            ["train", "{}/model", "--data", "{}/train.jsonl", "--out", "x", "--validation", "{}/train.jsonl"],
            1,
            "share 7 subjects",
        ),
        (
            ["train", "{}/model", "--data", "{}/train.jsonl", "--out", "x", "--modules", "nothing.*"],
            1,
            "no editable module",
        ),
        (["train", "{}", "--data", "{}/train.jsonl", "--out", "x"], 1, "no config.json"),
        (["evaluate", "{}/model", "--editor", "{}/editor", "--data", "atlas:tset"], 2, "no split 'tset'"),
        (["ask", "{}/model", "--edit", "{}/editor", "--prompt", "p"], 1, "not a remend.edit/1"),
        (["show", "{}"], 1, "not a folder saved by remend"),
        (
            ["edit", "{}/model", *EDITOR, "--out", "x", "--prompt", "p", "--target", "t " * 90],
            2,
            "context holds 48: shorten the target",
        ),
        (
            ["edit", "{}/nan", *EDITOR, "--out", "x", "--prompt", "p", "--target", "t"],
            1,
            "weight transformer.h.0.mlp.c_fc.weight holds NaN",
        ),
        (
            ["edit", "{}/llama", *EDITOR, "--out", "x", "--prompt", "p", "--target", "t"],
            1,
            "another class or configuration",
        ),
        (
            ["edit", "{}/model", *EDITOR, "--out", "x", "--requests", "{}/latin1.jsonl"],
            2,
            "line 1: byte 0xe9 is not UTF-8",
        ),
        (["edit", "{}/model", *EDITOR, "--out", "x", "--requests", "{}/empty.jsonl"], 2, "holds no request"),
        (["evaluate", "{}/model", "--editor", "{}/cut", "--data", "{}/test.jsonl"], 1, "truncated or altered"),
        (["ask", "{}/model", "--prompt", ""], 2, "--prompt: must not be empty"),
        (
            ["edit", "{}/model", *EDITOR, "--out", "{}/train.jsonl/x", "--prompt", "p", "--target", "t"],
            1,
            "cannot write",
        ),
        (["edit", "{}/model", *EDITOR, "--out", "{}/model", "--prompt", "p", "--target", "t"], 1, "was left alone"),
        (["train", "{}/model", "--data", "{}/train.jsonl", "--out", "{}/model"], 1, "was left alone"),
        (
            ["train", "{}/model", "--data", "{}/train.jsonl", "--out", "x", "--modules", "lm_head"],
            1,
            "no editable module",
        ),
        (["ask", "{}/broken", "--prompt", "p"], 1, "cannot load"),
        (["ask", "./nope", "--prompt", "p"], 1, "there is no folder ./nope"),
        (["show", "{}/editor"], 1, "holds a remend.editor/1, not a remend.edit/1"),
        (["sohw"], 2, "No such command"),
        (["show", "{}/editor", "--json", "a", "--json=b"], 2, "--json takes one value, and is given 2 times"),
        (["data", "convert", "a", "--out", "b", "--out", "c"], 2, "--out takes one value, and is given 2 times"),
        (["ask", "{}/model", "--pair", "--prompt", "p"], 2, "--pair takes --prompt twice"),
        (["ask", "{}/model", "--pair", "--chat", "--prompt", "p"], 2, "give one of them"),
        (["ask", "{}/model", "--pair", "--prompt", "p", "--prompt", "q"], 2, "given one text, not a pair"),
        (
            ["edit", "{}/model", *EDITOR, "--out", "x", "--pair", "--requests", "{}/test.jsonl"],
            2,
            "a list of two texts",
        ),
        (
            ["edit", "{}/model", *EDITOR, "--out", "x", "--prompt", "p", "--prompt", "q", "--target", "t"],
            2,
            "one edit at a time, not 2",
        ),
        (["doctor", "{}/llama/config.json", "--memory", "8"], 2, "--memory is for a model with weights"),
        (
            ["evaluate", "{}/model", "--editor", "{}/editor", "--data", "{}/test.jsonl", "--device", "abacus"],
            1,
            "abacus",
        ),
    ],
)
def test_wrong_use(arguments, code, message, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert remend(*(a.replace("{}", str(folder)) for a in arguments)) == code
    printed = capsys.readouterr()
    assert message in " ".join((printed.out + printed.err).split())
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_help_is_quick_and_complete(capsys):
    for command in ([], ["demo"], ["edit"], ["show"], ["ask"], ["train"], ["evaluate"]):
        assert remend(*command, "--help") == 0
        printed = capsys.readouterr().out
        assert "Usage" in printed
        if command:
            assert "--json" in printed
