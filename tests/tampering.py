"""Folders changed at random, as a failing disk or an attacker changes them, and a watch on what reading them opens."""

import copy
import functools
import hashlib
import json
import random
import shutil
import sys
from contextlib import contextmanager

from remend.cli import run
from remend.edit import Edit
from remend.editors import Mend, MendConfig, load_edit, make
from remend.errors import RemendError
from remend.formats import load_adapter, save_adapter, save_merged
from remend.formats.merged_checkpoint import MergedFormat
from remend.tasks import load

VALUES = [
    None, True, -1, 0, 7, 1e308, float("nan"), float("inf"), 10**400, "", "..", "../../outside.txt", "/etc/passwd",
    "x" * 10_000, "\ud800", "\x00", [], [[]], {}, {"a": None}, [0, -1], "0" * 64, 2**40, [2**40, 0], [60_000, 0],
    "BOOL", "I32", "F64", "F8_E5M2", "C64", ".*" * 20, {".*" * 20 + "x": 2},
    functools.reduce(lambda inner, _: [inner], range(300), 0),
]  # fmt: skip
"""What is put where something else is expected."""

_opened: list[str] | None = None


def _audit(event, arguments):
    if _opened is not None and event in ("open", "os.listdir", "os.rename", "os.remove", "os.mkdir"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def only_within(folder):
    """Within it nothing that :data:`VALUES` name outside of ``folder`` is touched, and no file in it is changed."""
    global _opened
    before, _opened = contents(folder.parent), []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    assert contents(folder.parent) == before
    outside = [name for name in opened if "outside" in name or "passwd" in name]
    assert not outside, outside


def contents(folder):
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def damage(folder, draw):
    """Change one file of a folder at random; half of the time its hash in a manifest is made to fit again."""
    file = draw.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    content = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and draw.random() < 0.7:
        lines = [content] if file.suffix == ".json" else content.splitlines()
        place = draw.randrange(len(lines))
        lines[place] = json.dumps(_changed(json.loads(lines[place]), draw)).encode()
        changed = b"\n".join(lines)
    elif file.suffix == ".safetensors" and draw.random() < 0.5:
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(_changed(json.loads(content[8 : 8 + size]), draw)).encode()
        changed = len(header).to_bytes(8, "little") + header + content[8 + size :]
    else:
        beginning = len(content) if draw.random() < 0.5 else 4096  # where large files say what they hold
        changed = _bytes(content[:beginning], draw) + content[beginning:]
    file.write_bytes(changed)
    manifest = folder / "manifest.json"
    if file != manifest and manifest.exists() and draw.random() < 0.5:
        known = json.loads(manifest.read_text())
        known["sha256"][file.name] = hashlib.sha256(changed).hexdigest()
        manifest.write_text(json.dumps(known))


def _bytes(content, draw):
    way, place = draw.randrange(4), draw.randrange(len(content))
    if way == 0:
        return content[:place]
    if way == 1:
        return content[:place] + draw.randbytes(draw.randint(1, 20)) + content[place:]
    found = bytearray(content)
    for step in range(draw.randint(1, 8)):
        found[draw.randrange(len(found)) if way == 2 else min(place + step, len(found) - 1)] = draw.randrange(256)
    return bytes(found)


def _changed(found, draw):
    """One of a JSON document's values put in place of another, left out, or made something else."""
    found = copy.deepcopy(found)
    places = list(_places(found))
    if not places:
        return draw.choice(VALUES)
    for _ in range(draw.randint(1, 2)):
        holder, key = draw.choice(places)
        way = draw.randrange(4)
        try:
            if way == 0:
                del holder[key]
            elif way == 1 and isinstance(holder, dict):
                holder[draw.choice(["../../outside", "unknown", "", "__metadata__"])] = holder.pop(key)
            elif way == 2:
                other, which = draw.choice(places)
                holder[key] = copy.deepcopy(other[which])
            else:
                holder[key] = draw.choice(VALUES)
        except (KeyError, IndexError):  # the first change took away what the second was to change
            continue
    return found


def _places(found):
    keys = found.keys() if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    for key in keys:
        yield found, key
        yield from _places(found[key])


def damaged_copies(good, tmp_path, times, seed=0):
    """Yield a copy of a folder again and again, each time damaged in another way."""
    draw, folder = random.Random(seed), tmp_path / "inner" / "damaged-folder"
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        damage(folder, draw)
        yield folder


def save_model(task, folder):
    """Write a whole model with its tokenizer, the weights in two files with an index."""
    task.model.save_pretrained(folder, max_shard_size="60KB")
    task.processor.save_pretrained(folder)


def same_function(task, found):
    """Whether a loaded model has the weights of another in modules of the same names."""
    own, loaded = task.model.state_dict(), found.model.state_dict()
    return own.keys() == loaded.keys() and all(own[name].shape == loaded[name].shape for name in own)


def kinds(task, request, edit):
    """How a folder of each kind is written, and how it is read; what is read can be saved again.

    Args:
        task: a small model.
        request: requests that it can be edited with.
        edit: an edit of it.
    """
    cached, in_context = (make(name, task).edit(task, request) for name in ("lookup", "in-context"))

    def read_model(folder):
        found = load(str(folder), "cpu")
        assert same_function(task, found)
        return found

    def read_checkpoint(folder):
        return MergedFormat().read(folder, task, read_model).edit

    def show(folder):
        found = Edit.load(folder)  # the command makes an exit code of its errors
        assert run(["show", str(folder)]) == 0
        return found

    return {
        "edit": (edit.save, show),
        "cache": (cached.save, load_edit),
        "context": (in_context.save, load_edit),
        "editor": (Mend.create(task, MendConfig(rank=4)).save, Mend.load),
        "adapter": (
            lambda folder: save_adapter(edit, folder, task.model),
            lambda folder: load_adapter(folder, task.model),
        ),
        "model": (lambda folder: save_model(task, folder), read_model),
        "checkpoint": (lambda folder: save_merged(edit, folder, task, "60KB"), read_checkpoint),
    }


def tried(make, read, tmp_path, times, seed=0):
    """Make a folder, damage it, read it; how often it was refused, and by which words it was.

    Args:
        make: writes a good folder.
        read: reads one; what it raises has to be an error of remend that names the folder or says what is wrong.
        tmp_path: where.
        times: how often.
        seed: of the damages.
    """
    (tmp_path / "outside.txt").write_text("secret")
    good, refusals = tmp_path / "good", []
    make(good)
    for folder in damaged_copies(good, tmp_path, times, seed):
        with only_within(folder):
            try:
                read(folder)
            except RemendError as error:
                refusals.append(str(error))
    assert not any("secret" in said or "Traceback" in said for said in refusals)
    assert all("damaged-folder" in said for said in refusals), "each names what it is about"
    return refusals
