"""Configurations: what a field takes is said once, checked everywhere, and described for a command line."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from remend.config import Config, from_json, settings, to_json
from remend.editors.enn import EnnConfig
from remend.editors.finetune import FineTuneConfig
from remend.editors.ke import KeConfig
from remend.editors.locate_then_edit.fit import FitConfig
from remend.editors.locate_then_edit.memit import MemitConfig
from remend.editors.locate_then_edit.rome import RomeConfig
from remend.editors.lookup import LookupConfig
from remend.editors.mend.config import MendConfig
from remend.editors.ridge import RidgeConfig
from remend.errors import ConfigError
from remend.training import Resources, TrainingConfig

KINDS = [
    *(MendConfig, KeConfig, EnnConfig, LookupConfig, RidgeConfig, FineTuneConfig, RomeConfig, MemitConfig, FitConfig),
    *(TrainingConfig, Resources),
]


@dataclass(frozen=True)
class Sample(Config):
    """A configuration that somebody else writes.

    Attributes:
        width: hidden units, of
            which there are many.
        mode: how.
    """

    width: PositiveInt = 2
    mode: Literal["slow", "fast"] = "slow"
    names: tuple[str, ...] = ()
    folder: Path | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_every_configuration_is_described_and_written(kind):
    assert [setting.name for setting in settings(kind) if setting.help and setting.allowed] == [
        setting.name for setting in settings(kind)
    ]
    content = json.loads(json.dumps(to_json(kind())))
    assert list(content) == ["version", *(setting.name for setting in settings(kind))]
    assert from_json(kind, content) == kind() == from_json(kind, {"version": 1})


def test_a_field_describes_itself():
    width, mode, names, folder, share = settings(Sample)
    assert (width.kind, width.default, width.allowed) == (int, 2, "a whole number of at least 1")
    assert width.help == "hidden units, of which there are many."
    assert (mode.kind, mode.choices, mode.allowed) == (str, ("slow", "fast"), "one of slow, fast")
    assert (folder.kind, folder.optional, folder.default) == (Path, True, None)
    assert share.allowed == "a finite number above 0 and of at most 1"
    assert names.help == ""
    inherited = {setting.name: setting for setting in settings(MemitConfig)}
    assert inherited["enough"].help
    assert inherited["largest"].default == 1.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, "Sample.width must be a whole number of at least 1, not 0"),
        ({"width": 2.0}, "Sample.width must be a whole number of at least 1, not 2.0"),
        ({"mode": "quick"}, "Sample.mode must be one of slow, fast, not 'quick'"),
        ({"share": 2}, "Sample.share must be a finite number above 0 and of at most 1, not 2"),
        ({"share": float("nan")}, "Sample.share must be a finite number above 0 and of at most 1, not nan"),
        ({"folder": 3}, "Sample.folder must be a Path or None, not 3"),
        ({"names": "ab"}, "Sample.names must be .*tuple.*, not 'ab'"),
    ],
)
def test_a_wrong_value_names_the_field_what_arrived_and_what_is_allowed(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sample(**wrong)
    with pytest.raises(ConfigError, match=message):
        replace(Sample(), **wrong)
    with pytest.raises(ConfigError, match=message.replace("a valid tuple", "a valid")):
        from_json(Sample, {"version": 1, **wrong})


def test_lists_and_strings_of_a_file_become_tuples_and_paths():
    sample = Sample(names=("a", "b"), folder=Path("c"), share=1)
    assert type(sample.share) is float
    content = json.loads(json.dumps(to_json(sample)))
    assert content == {"version": 1, "width": 2, "mode": "slow", "names": ["a", "b"], "folder": "c", "share": 1.0}
    assert from_json(Sample, content) == sample


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(ConfigError, match="Sample has no setting 'widht'; did you mean 'width'"):
        from_json(Sample, {"version": 1, "widht": 3})
