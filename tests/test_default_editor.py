"""The editor of a model that none was trained for: which it is, and that the commands use and name it."""

import json

import pytest
import transformers as hf
from torch import nn

import families
import remend
import worlds
from remend.cli import run
from remend.editors import default_editor, make
from remend.errors import ConfigError
from remend.tasks import wrap
from remend.tasks.policy import DiscreteActions

REQUEST = ["--prompt", "The capital of Peru is", "--target", "Rome", "--keep-failed", "--overwrite"]


def tanh_model():
    """A model to whose MLPs no hidden units can be added: their response has no threshold."""
    config = families.make("llama").config
    config.hidden_act = "tanh"
    return hf.LlamaForCausalLM(config).eval()


def policy():
    network = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    return remend.wrap(network, DiscreteActions(("left", "stay", "right"), 4))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated", "bert, many classes"])
def test_models_that_read_text_get_hidden_units(family):
    task = families.task(family)
    default = default_editor(task)
    assert (default.name, default.config.kind, default.reason) == ("fit", "units", "")
    edit = make(default.name, task, config=default.config).edit(task, families.requests(family, 1))
    assert all(change.reads for change in edit.changes.values())


def test_where_no_units_can_be_added_edits_are_of_low_rank():
    task = wrap(tanh_model(), worlds.tokenizer())
    default = default_editor(task)
    assert (default.name, default.config.kind) == ("fit", "low-rank")
    assert "hidden units" in default.reason
    with pytest.raises(ConfigError, match="leave them away"):
        default_editor(task, {"kind": "units"})
    assert default_editor(task, {"steps": 3}).config.steps == 3


def test_what_reads_no_text_gets_ridge():
    task = policy()
    default = default_editor(task)
    assert default.name == "ridge"
    assert "it looks for the subject" in default.reason
    make(default.name, task, config=default.config)
    with pytest.raises(ConfigError, match="The settings are those of fit"):
        default_editor(task, {"steps": 3})


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (worlds.llama, [], "editor: fit of kind units\n"),
        (worlds.llama, ["--set", "kind=low-rank"], "editor: fit of kind low-rank\n"),
        (tanh_model, [], "editor: fit of kind low-rank; fit of kind units was not possible: "),
    ],
    ids=["units", "as set", "no units"],
)
def test_a_command_says_which_editor_it_used(model, settings, said, tmp_path, capsys):
    model().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    out = ["--out", str(tmp_path / "edit"), "--json", str(tmp_path / "edit.json")]
    run(["edit", str(tmp_path / "model"), *REQUEST, *settings, *out])
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "edit.json").read_text())["editor"] == "fit"
    kind = remend.Edit.load(tmp_path / "edit").editor["config"]["kind"]
    assert kind in said.partition(";")[0]


def test_settings_of_the_default_editor_are_checked_before_the_model_is_read(tmp_path, capsys):
    (tmp_path / "model").mkdir()  # holds no model
    assert run(["edit", str(tmp_path / "model"), *REQUEST, "--set", "stepz=3", "--out", str(tmp_path / "edit")]) == 2
    assert "steps" in capsys.readouterr().err


def test_edits_of_units_say_how_to_get_an_adapter(tmp_path, capsys):
    worlds.llama().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    model, edit = str(tmp_path / "model"), str(tmp_path / "edit")
    run(["edit", model, *REQUEST, "--out", edit])
    capsys.readouterr()
    export = ["export", edit, "--to", "peft", "--model", model, "--out", str(tmp_path / "adapter")]
    assert run(export) != 0
    assert "low-rank" in " ".join(capsys.readouterr().err.split())
    run(["edit", model, *REQUEST, "--set", "kind=low-rank", "--out", edit])
    assert run(export) == 0
