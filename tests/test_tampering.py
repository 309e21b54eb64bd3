"""Folders of every kind, changed at random: each is read as what it still is, or refused in words.

Acceptance files, patch registries and files of requests are changed in ``test_acceptance``, ``test_patch_registry`` and
``test_request_files``; thousands of files and folders of all kinds are tried by ``scripts/malformed_inputs.py``.
"""

from dataclasses import replace
from pathlib import Path

import pytest

import families
import tampering
import worlds
from remend.apps.hub.evaluation_rows import evaluation_rows
from remend.editors import load_editor
from remend.errors import FileError, RemendError
from remend.formats import detect_format
from remend.saved_folders import read_verified_manifest, write_json
from tampered_files import file_kinds
from test_formats import random_edit

TIMES = {
    "edit": 120, "cache": 120, "context": 120, "editor": 120, "adapter": 120, "model": 30, "checkpoint": 20,
    "recipe": 60, "report": 60, "verdict": 60, "gguf": 20, "training": 12, "evaluation": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """A small model, requests, and an edit."""
    task, request = families.task("llama"), families.requests("llama", 1)
    return task, request, replace(random_edit(task.model), requests=tuple(request))


@pytest.fixture(scope="module")
def kinds(made):
    """How a folder of each kind is written, and how it is read."""
    return tampering.kinds(*made)


PATHS = ["a\0b", "a\ud800", "x" * 300, "/dev/null/x", "hf:a/b/../../x", "hf:a/b@../../x", "hf:a", "hf:a/b\0", ""]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_are_none_are_refused_by_whatever_reads_or_writes(kinds, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (write, read) in kinds.items():
        with pytest.raises(RemendError):
            read(path)
        if "hf:" not in path and path and name != "model":  # that is written by transformers
            with pytest.raises(RemendError):
                write(path)
    for function in (detect_format, read_verified_manifest, load_editor):
        with pytest.raises(RemendError):
            function(Path(path) if function is detect_format else path)
    if "hf:" not in path and path:
        with pytest.raises(RemendError):
            write_json(path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", TIMES)
def test_folders_changed_at_random_are_refused_or_can_be_written_again(made, kinds, kind, tmp_path):
    """Nothing outside the folder is touched by reading it, and nothing in it is written."""
    if kind == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'remend[gguf]'")
    write, read = (kinds if kind in kinds else file_kinds(made[0], worlds.requests(8), made[2]))[kind]
    found = []
    refusals = tampering.tried(write, lambda folder: found.append(read(folder)), tmp_path, TIMES[kind])
    assert len(refusals) + len(found) == TIMES[kind]
    assert len(refusals) >= TIMES[kind] // 4
    for number, one in enumerate(found):
        if hasattr(one, "save") and hasattr(one, "load"):
            one.save(tmp_path / f"again {number}")


def test_a_verdict_with_a_number_beyond_all_is_refused(tmp_path):
    check = {"name": "takes", "measured": 10**400, "bound": 1.0, "ok": False, "count": 2, "failed": []}
    write_json(tmp_path / "verdict.json", {"ok": False, "checks": [check]})
    with pytest.raises(FileError, match="not a result of remend guard"):
        evaluation_rows(tmp_path / "verdict.json")
