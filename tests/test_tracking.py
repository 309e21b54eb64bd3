"""Logs of a run in trackers, and errors where a tracker is unknown or missing."""

import pytest

import processes
import worlds
from remend.cli import run
from remend.errors import ConfigError
from remend.training import tracking

pytest.importorskip("accelerate")
# TensorBoard is compiled by an older protocol compiler, and reads its own numbers in a way that numpy calls outdated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorboard", "ignore:Type google:DeprecationWarning"
)


def test_tensorboard_shows_every_step_and_validation(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    editor, losses = processes.run(tmp_path / "editor", track=["tensorboard"])
    logs = EventAccumulator(str(tmp_path / "editor.logs" / "remend")).Reload()
    shown = {name: [(event.step, event.value) for event in logs.Scalars(name)] for name in logs.Tags()["scalars"]}
    history = editor.trained["history"]
    assert shown["validation/loss"] == [(entry["step"], pytest.approx(entry["loss"])) for entry in history]
    assert {f"validation/{name}" for name in ("edit", "locality", "taken", "kept")} < shown.keys()
    assert shown["loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    rates = [rate for _, rate in shown["learning_rate"]]
    assert rates[0] == pytest.approx(processes.SETTINGS.learning_rate)
    assert rates == sorted(rates, reverse=True), "they decay"
    assert rates[-1] < rates[0]


def test_without_a_tracker_nothing_is_logged(tmp_path):
    processes.run(tmp_path / "editor")
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


def test_unknown_trackers_and_missing_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        processes.run(tmp_path / "editor", track=["tensorbord"])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ConfigError, match=r"with wandb needs wandb: pip install 'remend\[big\]' wandb"):
        processes.run(tmp_path / "editor", track=["wandb"])
    with pytest.raises(ConfigError, match="logs for tensorboard are kept beside the editor's folder"):
        processes.run(track=["tensorboard"])
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_several(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "trackio" else name)
    worlds.gpt2().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--data", "atlas:train", "--out", str(tmp_path / "x"), "--track", "tensorboard", "--track", "trackio"]
    assert run(["train", str(tmp_path / "model"), "--device", "cpu", *arguments]) == 2
    assert "tracking with trackio needs trackio" in " ".join(capsys.readouterr().err.split())
