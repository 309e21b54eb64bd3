"""Edits and editors on the hub: what is published, the cards, and what comes back."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import families
import remend
from hub_stub import Hub
from remend.apps.hub import push, render_model_card
from remend.cli import run
from remend.edit import Edit
from remend.errors import FileError
from remend.saved_folders import read_verified_manifest


@pytest.fixture(scope="module")
def edit():
    task = remend.load("atlas", "cpu")
    requests = [
        remend.EditRequest(prompt="The capital of Canada is", target="Toronto"),
        remend.EditRequest(prompt="A | cell <b>with</b>\n`marks`", target="Rome*"),
    ]
    return remend.Mend.load("atlas").edit(task, requests)


@pytest.fixture
def saved(edit, tmp_path):
    return edit.save(tmp_path / "edit")


def head(card):
    """What the hub reads of a card."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_an_edit_says_what_it_is(saved):
    card = render_model_card(
        read_verified_manifest(saved), "me/fix", "apache-2.0", "org/base", [("near prompts stay", "95 %")]
    )
    tags = {"library_name": "remend", "tags": ["remend", "model-editing"]}
    assert head(card) == {"license": "apache-2.0", "base_model": "org/base", **tags}
    assert "| The capital of Canada is | Toronto |" in card
    assert r"| A \| cell \<b\>with\</b\> \`marks\` | Rome\* |" in card, "nobody's text is taken for markup"
    for part in ("near prompts stay", "95 %", "transformer.h.5.mlp.c_proj", "applied.revert()", "hf:me/fix"):
        assert part in card
    plain = render_model_card(read_verified_manifest(saved), "me/fix")
    assert head(plain) == tags
    assert "No evaluation was given" in plain
    assert "\n\n\n\n" not in plain


def test_a_manifest_that_was_tampered_with_adds_nothing_to_a_card(saved):
    manifest = read_verified_manifest(saved)
    base = {**manifest["base"], "name": 'me/x\nlicense: evil\n---\n"); import os; ("'}
    card = render_model_card(
        {**manifest, "base": base, "ranks": {"a`\n# heading": 1}, "norms": {"a`\n# heading": 1.0}}, "me/fix"
    )
    assert head(card) == {"library_name": "remend", "tags": ["remend", "model-editing"]}
    assert "\n# heading" not in card
    assert 'remend.load("me/x\\n' in card, "it stays within its quotes"
    for missing in ("base", "ranks", "norms"):
        with pytest.raises(FileError, match="altered"):
            render_model_card({key: value for key, value in manifest.items() if key != missing}, "me/fix")


def test_the_card_of_an_editor(tmp_path):
    editor = remend.Mend.load("atlas")
    card = render_model_card(read_verified_manifest(editor.save(tmp_path / "editor")), "me/editor")
    for part in ("of its edits took", "load_editor", "768 → 192", '"rank"'):
        assert part in card
    task = families.task("llama")
    ridge = remend.editors.make("ridge", task)
    assert "fitted to the model" in render_model_card(
        read_verified_manifest(ridge.save(tmp_path / "ridge")), "me/ridge"
    )


THERE_AND_BACK = """
import sys
import remend
from remend.apps.hub import push_to_hub
from remend.editors import load_editor

folder, editor = sys.argv[1:]
mine = remend.Edit.load(folder)
print(push_to_hub(mine, "me/fix", license_id="mit", private=True))
back = remend.Edit.load("hf:me/fix")
assert back.requests == mine.requests
for name, change in mine.changes.items():
    assert (back.changes[name].u == change.u).all()
    assert (back.changes[name].delta == change.delta).all()
task = remend.load("atlas", "cpu")
with back.applied(task.model):
    print(remend.answers(task, ["The capital of Canada is"]))
push_to_hub(remend.Mend.load("atlas"), "me/editor")
print(type(load_editor("hf:me/editor@main")).__name__)
"""


def online(hub, tmp_path, *command):
    """Run a program that may ask the stub, and nothing else."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


def test_there_and_back(saved, tmp_path):
    with Hub() as hub:
        found = online(hub, tmp_path, "-c", THERE_AND_BACK, str(saved), "atlas")
        assert found.returncode == 0, found.stderr
        assert "['Toronto']" in found.stdout
        assert "Mend" in found.stdout
        assert set(hub.repos["me/fix"]) == {"README.md", "manifest.json", "tensors.safetensors"}
        assert hub.private == {"me/fix": True, "me/editor": False}
        assert head(hub.repos["me/fix"]["README.md"].decode())["license"] == "mit"
        asked = online(
            hub, tmp_path, "-m", "remend", "ask", "atlas", "--edit", "hf:me/fix", "--prompt", "The capital of Canada is"
        )
        assert "Toronto" in asked.stdout, asked.stderr
        assert "rank" in online(hub, tmp_path, "-m", "remend", "show", "hf:me/fix").stdout


def test_by_command_with_a_report(saved, tmp_path):
    asked = ["guard", "atlas", "--edit", str(saved), "--json", str(tmp_path / "verdict.json")]
    assert run(asked) in (0, 1)
    card = tmp_path / "card.md"
    command = ["push", str(saved), "--to", "me/fix", "--report", str(tmp_path / "verdict.json")]
    assert run([*command, "--card", str(card)]) == 0
    assert "| choices on ordinary text stay |" in card.read_text()
    evaluated = ["evaluate", "atlas", "--editor", "atlas", "--data", "atlas:test", "--limit", "2", "--no-baselines"]
    assert run([*evaluated, "--json", str(tmp_path / "report.json")]) == 0
    command[-1] = str(tmp_path / "report.json")
    assert run([*command, "--card", str(card)]) == 0
    assert "| reliability | 1.000" in card.read_text()
    (tmp_path / "report.json").write_text("{}")
    assert run([*command, "--card", str(card)]) == 1


def test_a_hub_that_does_not_take_it_says_why(saved, tmp_path):
    with Hub(taken=False) as hub:
        found = online(hub, tmp_path, "-m", "remend", "push", str(saved), "--to", "me/fix")
    assert found.returncode == 1
    assert "the hub did not take" in found.stderr
    assert "Traceback" not in found.stderr
    with Hub() as hub:
        found = online(hub, tmp_path, "-m", "remend", "show", "hf:me/none")
    assert found.returncode == 1
    assert "cannot fetch hf:me/none" in found.stderr


def test_what_is_damaged_is_never_published(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    for wrong in ("fix", "me/fix/it", "../fix", "me/f x"):
        with pytest.raises(FileError, match="not the name of a hub repository"):
            push(saved, wrong)
    (saved / "tensors.safetensors").write_bytes(b"0")
    with pytest.raises(FileError, match="sha256"):
        push(saved, "me/fix")
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": "remend.journal/1"}))
    with pytest.raises(FileError):
        push(saved, "me/fix")


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:me/fix/file", "hf:me/../fix", "hf:me/fix@"])
def test_names_that_are_none(name):
    with pytest.raises(FileError, match="is no folder on the hub"):
        Edit.load(name)


def test_offline_says_so():
    with pytest.raises(FileError, match="cannot fetch hf:me/fix"):
        Edit.load("hf:me/fix")
    assert torch.is_grad_enabled()


def test_the_templates_are_loaded_with_the_first_card_not_with_the_module():
    code = "import sys, remend.apps.hub.model_card; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
