"""Registries: what is found by name, what other packages add, and the messages for everything else."""

import subprocess
import sys

import pytest

from remend import registries
from remend.errors import RegistryError
from remend.registries import DATASETS, DataSet
from remend.registry import Registry, RegistryEntry

REGISTRIES = {name: value for name, value in vars(registries).items() if isinstance(value, Registry)}


def fruits():
    return Registry("fruit", "fruits.of.no.package", RegistryEntry, [RegistryEntry("apple", "json:dumps", "round")])


def test_every_entry_has_help_and_a_target_that_can_be_imported():
    assert "DATASETS" in REGISTRIES
    for registry in REGISTRIES.values():
        for name in registry.names():
            entry = registry.get(name)
            assert (entry.name, bool(entry.help)) == (name, True)
            assert registry.load(name) is not None


def test_names_are_listed_without_importing_what_they_name():
    code = "import sys; from remend import registries as r; r.DATASETS.names(); list(r.DATASETS)"
    subprocess.run([sys.executable, "-c", f"{code}; assert not {{'torch', 'numpy'}} & sys.modules.keys()"], check=True)


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(RegistryError, match="there is no data set 'zrse'; did you mean 'zsre'"):
        DATASETS.get("zrse")
    with pytest.raises(RegistryError, match="there is no fruit 'zzz'; known: apple"):
        fruits().load("zzz")


def test_registered_entries_are_loaded_by_text_or_as_the_object_itself():
    registry = fruits()
    registry.register("pear", "os.path:join", help="green")
    entry = registry.register("plum", fruits)
    assert registry.names() == ["apple", "pear", "plum"]
    assert [entry.name for entry in registry] == registry.names()
    assert registry.load("pear")("a", "b") == "a/b"
    assert (registry.load("plum"), registry.get("plum")) == (fruits, entry)
    assert "pear" in registry
    registry.unregister("pear")
    assert "pear" not in registry
    with pytest.raises(RegistryError, match="no fruit 'pear' was registered"):
        registry.unregister("pear")


def test_what_cannot_be_registered_is_refused():
    registry = fruits()
    with pytest.raises(RegistryError, match="there is a fruit 'apple' already: choose another name"):
        registry.register("apple", "os:sep")
    with pytest.raises(RegistryError, match="target of the fruit 'fig' should be 'module:attribute', not 'os'"):
        registry.register("fig", "os")
    with pytest.raises(RegistryError, match="a data set has no field 'licence'; did you mean 'license'"):
        DATASETS.register("mine", "os:sep", licence="MIT")
    assert registry.names() == ["apple"]


def test_a_target_that_cannot_be_imported_is_named():
    registry = fruits()
    registry.register("fig", "no_such_module:fig")
    registry.register("date", "json:no_such_attribute")
    with pytest.raises(RegistryError, match=r"fruit 'fig' cannot be imported from no_such_module:fig .ModuleNotFound"):
        registry.load("fig")
    with pytest.raises(RegistryError, match=r"fruit 'date' cannot be imported from json:no_such_attribute .Attribute"):
        registry.load("date")


def test_entry_points_of_installed_packages_are_found(other_package):
    code = """
from remend.registries import DataSet

def read(path, skip):
    '''Read nothing.'''
    return iter(())

ENTRY = DataSet('named otherwise', read, 'my data', license='MIT')
"""
    other_package(DATASETS, code, mine="other_package:ENTRY", plain="other_package:read")
    assert DATASETS.names()[-2:] == ["mine", "plain"]
    assert "other_package" not in sys.modules, "names need no import"
    entry = DATASETS.get("mine")
    assert isinstance(entry, DataSet)
    assert (entry.name, entry.help, entry.license) == ("mine", "my data", "MIT")
    assert DATASETS.get("plain").help == "Read nothing."
    assert DATASETS.load("plain") is DATASETS.load("mine")


def test_a_broken_entry_point_is_named_and_does_not_disturb_the_rest(other_package):
    other_package(DATASETS, "1 / 0", broken="other_package:read", zsre="other_package:read")
    assert "broken" in DATASETS
    with pytest.raises(RegistryError, match=r"'broken' cannot be imported from other_package:read .ZeroDivisionError"):
        DATASETS.get("broken")
    with pytest.raises(RegistryError, match=r"'zsre' is declared more than once .other_package:read, remend.: uninst"):
        DATASETS.get("zsre")
    assert DATASETS.get("nq").license == "Apache-2.0"
