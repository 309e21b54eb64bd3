"""Folders of every kind, changed at random: each is read as what it still is, or refused in words.

Acceptance files and patch registries are changed in ``test_acceptance`` and ``test_patch_registry``; a thousand folders
are tried by ``scripts/malformed_inputs.py``.
"""

from dataclasses import replace

import pytest

import families
import tampering
from test_formats import random_edit

TIMES = {"edit": 120, "cache": 120, "context": 120, "editor": 120, "adapter": 120, "model": 30, "checkpoint": 20}


@pytest.fixture
def kinds():
    """How a folder of each kind is written, and how it is read."""
    task, request = families.task("llama"), families.requests("llama", 1)
    return tampering.kinds(task, request, replace(random_edit(task.model), requests=tuple(request)))


@pytest.mark.parametrize("kind", TIMES)
def test_folders_changed_at_random_are_refused_or_can_be_written_again(kinds, kind, tmp_path):
    """Nothing outside the folder is touched by reading it, and nothing in it is written."""
    write, read = kinds[kind]
    found = []
    refusals = tampering.tried(write, lambda folder: found.append(read(folder)), tmp_path, TIMES[kind])
    assert len(refusals) + len(found) == TIMES[kind]
    assert len(refusals) >= TIMES[kind] // 4
    for number, one in enumerate(found):
        if hasattr(one, "save"):
            one.save(tmp_path / f"again {number}")
