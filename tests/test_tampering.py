"""Folders of every kind, changed at random: each is read as what it still is, or refused in words.

Acceptance files and patch registries are changed in ``test_acceptance`` and ``test_patch_registry``.
"""

from dataclasses import replace

import pytest

import families
import tampering
from remend.editors import Mend, MendConfig, load_edit, make
from remend.formats import load_adapter, save_adapter
from test_formats import random_edit

TIMES = 120


@pytest.fixture
def kinds():
    """How a folder of each kind is written, and how it is read."""
    task, request = families.task("llama"), families.requests("llama", 1)
    model = task.model
    edit = replace(random_edit(model), requests=tuple(request))
    cached, in_context = (make(name, task).edit(task, request) for name in ("lookup", "in-context"))
    return {
        "edit": (edit.save, load_edit),
        "cache": (cached.save, load_edit),
        "context": (in_context.save, load_edit),
        "editor": (Mend.create(task, MendConfig(rank=4)).save, Mend.load),
        "adapter": (lambda folder: save_adapter(edit, folder, model), lambda folder: load_adapter(folder, model)),
    }


@pytest.mark.parametrize("kind", ["edit", "cache", "context", "editor", "adapter"])
def test_folders_changed_at_random_are_refused_or_can_be_written_again(kinds, kind, tmp_path):
    """Nothing outside the folder is touched by reading it, and nothing in it is written."""
    write, read = kinds[kind]
    found = []
    refusals = tampering.tried(write, lambda folder: found.append(read(folder)), tmp_path, TIMES)
    assert len(refusals) + len(found) == TIMES
    assert len(refusals) > TIMES // 4
    for number, one in enumerate(found):
        one.save(tmp_path / f"again {number}")
