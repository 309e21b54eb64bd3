"""Kill every command at each of its operations on files, and let the disk be full, or read-only, from each of them on.

    PYTHONPATH=src python scripts/faults_at_every_file_operation.py --out benchmarks/results/file_faults.json

Each run of a command is a process of its own, the fork of one that has imported everything. It is killed before its
first operation that changes a file, before its second one, …, whatever library does it (``file_faults.c`` is compiled
for this, so it takes a C compiler, and Linux). After each fault every file and folder has its earlier or its new
content, whole. After a kill the command runs once more: then all is as if there had been no fault, and nothing is left
over. On a disk that fails, a command ends with an exit code other than 0 and a sentence that names the disk's fault and
the place, or it has done its work; from a full disk it removes what it began.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LIBRARY = "REMEND_FILE_FAULTS"
"""The environment's variable that names the compiled library, in the process that has it loaded."""
KILL = -1
FAULTS = {"kill": KILL, "full disk": errno.ENOSPC, "read-only disk": errno.EROFS}


@dataclass(frozen=True)
class Case:
    """A command line that writes.

    Attributes:
        command: the arguments; ``{made}`` is a folder with a model, requests and an edit, ``{here}`` the folder in
            which it writes.
        before: what is there before, by its name in ``made``.
        again: the arguments of the next run, if not the same.
    """

    command: str
    before: tuple[str, ...] = ()
    again: str | None = None


_EDIT = "edit {made}/model --editor finetune --set steps=2 --keep-failed --max-new-tokens 2 --device cpu"
_NEW = f"{_EDIT} --requests {{made}}/other.jsonl --out {{here}}/edit"
_EXPAND = "expand {made}/model --prompt Peru --target Rome --rounds 0 --device cpu"
_EXPAND_ALL = "expand {made}/model --requests {made}/other.jsonl --rounds 0 --device cpu"
_TRAIN = "train {made}/model --data {made}/requests.jsonl --validation {made}/held_out.jsonl --out {here}/editor "
_TRAIN += "--max-steps 2 --checkpoint-minutes 0 --allow-shared facts --device cpu"
_EVALUATE = "evaluate {made}/model --editor finetune --set steps=1 --data {made}/requests.jsonl --limit 2 "
_EVALUATE += "--device cpu --no-frontier --max-new-tokens 2 --json {here}/report.json"
_RECIPE = "recipe run bert-base-fever --model {made}/classifier --out {here}/run --max-steps 1 --device cpu"
_RECIPE += "".join(f" --{split} fever:{{made}}/{split}.jsonl" for split in ("train", "validation", "test"))
CASES = {
    "edit": Case(f"{_NEW} --json {{here}}/edit.json", again=f"{_NEW} --json {{here}}/edit.json --overwrite"),
    "edit --html": Case(f"{_NEW} --html {{here}}/page.html", again=f"{_NEW} --html {{here}}/page.html --overwrite"),
    "edit --overwrite": Case(f"{_NEW} --overwrite", ("edit",)),
    "expand": Case(
        f"{_EXPAND} --out {{here}}/set.jsonl", again=f"{_EXPAND} --out {{here}}/set.jsonl --overwrite"
    ),
    "expand --requests": Case(
        f"{_EXPAND_ALL} --out {{here}}/sets.jsonl", again=f"{_EXPAND_ALL} --out {{here}}/sets.jsonl --overwrite"
    ),
    "export": Case("export {made}/edit --model {made}/model --to peft --out {here}/adapter"),
    "export, again": Case("export {made}/other_edit --model {made}/model --to peft --out {here}/adapter", ("adapter",)),
    "export merged": Case("export {made}/edit --model {made}/model --to merged --out {here}/merged --device cpu"),
    "import": Case("import {made}/adapter --model {made}/model --out {here}/imported --device cpu"),
    "book init": Case("book init {here}/book --model {made}/model"),
    "book add": Case("book add {here}/book {made}/other_edit", ("book",)),
    "book activate": Case("book activate {here}/book 1 --force --model {made}/model --device cpu", ("book",)),
    "book revert": Case("book revert {here}/active_book 1", ("active_book",)),
    "book verify --repair": Case("book verify {here}/left_book --repair", ("left_book",)),
    "book export": Case("book export {here}/active_book --to native --out {here}/all", ("active_book",)),
    "train": Case(_TRAIN, again=f"{_TRAIN} --resume"),
    "evaluate": Case(f"{_EVALUATE} --html {{here}}/report.html --pictures {{here}}/pictures", again=f"{_EVALUATE} "
                     "--html {here}/report.html --pictures {here}/pictures --resume"),
    "compare": Case("compare {made}/report.json {made}/report.json --plot {here}/plot.svg"),
    "guard": Case("guard {made}/model --edit {made}/edit --max-new-tokens 2 --json {here}/guard.json --device cpu"),
    "data convert": Case("data convert {made}/requests.csv --out {here}/requests.jsonl --json {here}/about.json"),
    "data check": Case("data check {made}/requests.jsonl {made}/held_out.jsonl --json {here}/overlap.json"),
    "doctor": Case("doctor {made}/model --data {made}/requests.jsonl --json {here}/doctor.json --device cpu"),
    "show": Case("show {made}/edit --json {here}/show.json"),
    "push --card": Case("push {made}/edit --to owner/name --base owner/model --card {here}/README.md"),
    "recipe run": Case(_RECIPE),
}  # fmt: skip
KILLED = ("edit", "edit --overwrite", "export", "book", "train")
"""Commands of which every operation is tried; of the others with many, one in a few."""
AMID_ADDING = 20
"""At which of its operations ``book add`` has written the edit's folder, and not its record."""
MOST = 24
"""How many of the others' operations are tried, at most."""


# -- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: the exit code; None if it was killed.
        operations: how many operations it came to; None if it was killed.
        said: what it printed, and its traceback if it had one.
    """

    code: int | None
    operations: int | None
    said: str


def run_in_fork(command: str, here: Path, made: Path, operation: int = 0, fault: int = 0) -> Ended:
    """Run a command line in a fork of this process, with a fault from one of its operations on files below ``here``."""
    arguments = command.format(made=made, here=here).split()
    output, counted = here.parent / "said", here.parent / "counted"
    counted.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        _run(arguments, here, output, counted, operation, fault)
    _, status = os.waitpid(child, 0)
    said = output.read_text(errors="replace")
    if os.WIFSIGNALED(status):
        return Ended(None, None, said)
    return Ended(os.waitstatus_to_exitcode(status), int(counted.read_text()), said)


def _run(arguments: Sequence[str], here: Path, output: Path, counted: Path, operation: int, fault: int) -> None:
    """Be the fork: run the command, write how many operations it came to, and exit."""
    from remend.cli import run

    code = 70
    try:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        library = ctypes.CDLL(os.environ[LIBRARY])
        library.file_faults_begin(os.fsencode(here), ctypes.c_long(operation), fault)
        try:
            code = run(arguments)
        except BaseException:
            traceback.print_exc()
        counted.write_text(str(library.file_faults_end()))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# -- contents --------------------------------------------------------------------------------------------------------


class Contents:
    """What files and folders hold, told by reading them as whoever uses them does.

    Args:
        made: the folder with the model.
    """

    def __init__(self, made: Path) -> None:
        from remend.tasks import load

        self.task = load(str(made / "model"), "cpu")

    def of(self, folder: Path) -> dict[str, Any]:
        """Return the contents of all that stands in a folder, by name; an exception's text of what is not whole."""
        return {path.name: self._of(path) for path in sorted(folder.iterdir())}

    def _of(self, path: Path) -> Any:
        try:
            return self._folder(path) if path.is_dir() else self._file(path)
        except Exception as error:  # whatever it is, the content is not whole
            return f"damaged: {type(error).__name__}: {error}"

    def _folder(self, path: Path) -> Any:
        from remend.apps.patch_registry import PatchRegistry
        from remend.edit import Edit
        from remend.editors import load_editor
        from remend.formats import load_adapter
        from remend.saved_folders import read_format
        from remend.tasks import load

        if path.name.endswith("book"):
            registry = PatchRegistry(path)
            entries = {str(entry.id): (entry.state, registry.load(entry.id).requests) for entry in registry.entries}
            faults = registry.verify()
            if lost := [fault.what for fault in faults if fault.lost]:
                raise RuntimeError(lost)
            return {**entries, **{f".remend-left-{number}": fault.what for number, fault in enumerate(faults)}}
        if (kind := read_format(path)).startswith("remend.edit/"):
            return Edit.load(path).requests
        if kind:
            return type(load_editor(path)).__name__
        if (path / "adapter_config.json").exists():
            change = next(iter(load_adapter(path, self.task).changes.values()))
            return float(change.u[0, 0])
        if (path / "config.json").exists():
            return sum(float(tensor.float().sum()) for tensor in load(str(path), "cpu").model.parameters())
        return self.of(path)

    def _file(self, path: Path) -> Any:
        from remend.data import read_source

        text = path.read_bytes().decode(errors="surrogateescape")
        if path.suffix == ".jsonl":
            return read_source(str(path))
        if path.suffix == ".json":
            return sorted(json.loads(text))
        ends = {".html": "</html>", ".svg": "</svg>", ".png": "IEND\udcaeB`\udc82"}
        assert text.rstrip("\n").endswith(ends.get(path.suffix, "")), "it has no end"
        assert text, "it is empty"
        return path.suffix


UNFINISHED = re.compile(r"\.remend-.*|.*\.checkpoints|.*\.partial")
"""What a stopped run may leave for the next one."""


def _finished(found: Any, old: Any) -> Any:
    """Return contents without what a run has left; what was left before it stays, as a repair would remove it."""
    if not isinstance(found, dict):
        return found
    before = old if isinstance(old, dict) else {}
    kept = [name for name in found if name in before or not UNFINISHED.fullmatch(name)]
    return {name: _finished(found[name], before.get(name)) for name in kept}


def losses(found: Any, old: Any, new: Any) -> list[str]:
    """Say what of some contents is neither as it was nor as it should become."""
    if found in (old, new):
        return []
    if not all(isinstance(part, dict) for part in (found, old or {}, new)):
        return [f"{found} is neither {old} nor {new}"]
    old = old or {}
    gone = [f"{name} is gone" for name in old if name not in found]
    known = [name for name in found if not UNFINISHED.fullmatch(name)]
    unknown = [f"{name} is left" for name in known if name not in old and name not in new]
    return gone + unknown + [
        f"{name}: {text}"
        for name in known
        if name in new or name in old
        for text in losses(found[name], old.get(name), new.get(name, old.get(name)))
    ]  # fmt: skip


# -- trying ----------------------------------------------------------------------------------------------------------


def lay_out(case: Case, made: Path, root: Path) -> Path:
    """Return a new folder with what is there before a command."""
    here = root / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    for name in case.before:
        shutil.copytree(made / name, here / name)
    return here


def try_case(case: Case, made: Path, root: Path, contents: Contents, fault: str, most: int | None) -> dict[str, Any]:
    """Try a fault at the operations of a command; return counts and failures."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    here = lay_out(case, made, root)
    old = contents.of(here)
    clean = run_in_fork(case.command, here, made)
    new = contents.of(here)
    if not clean.operations or (clean.code and "check" not in case.command):
        raise RuntimeError(f"{case.command}: {clean}")
    stride = max(1, clean.operations // most) if most else 1
    for operation in range(1, clean.operations + 1, stride):
        here = lay_out(case, made, root)
        ended = run_in_fork(case.command, here, made, operation, FAULTS[fault])
        counts["tries"] += 1
        if ended.code is not None and ended.operations < operation:
            break  # a full disk refuses fewer operations than there are
        found = contents.of(here)
        faults = losses(found, old, new)
        if FAULTS[fault] == KILL:
            counts["killed"] += ended.code is None
            faults += [f"it ended with {ended.code} {ended.said[-2000:]}"] if ended.code is not None else []
            again = run_in_fork(case.again or case.command, here, made)
            if (after := contents.of(here)) != new:
                faults.append(f"after the next run ({again.code}): {after}, not {new} {again.said[-1500:]}")
        else:
            if FAULTS[fault] == errno.ENOSPC:  # what is there can be removed from a full disk
                faults += [f"{name} is left" for name in found if name.startswith(".remend-")]
            done = _finished(found, old) == new
            faults += _wrong_end(ended, FAULTS[fault], here, done, clean.code)
            counts["done all the same" if ended.code == clean.code else "refused"] += 1
        failures += [f"{operation}: {text}" for text in faults]
    return {"operations": clean.operations, **counts, "failures": failures}


def _wrong_end(ended: Ended, error: int, here: Path, done: bool, right: int | None) -> list[str]:
    """Say what is wrong about the end of a command on a disk that failed."""
    if "Traceback" in ended.said:
        return [f"a traceback {ended.said[-3000:]}"]
    if ended.code == right and done:
        return []
    wrong = ["it ended as if nothing had happened"] if ended.code == right else []
    said = " ".join(ended.said.split())
    if not any(words in said for words in (os.strerror(error), "the disk", "read-only", "not a folder one can write")):
        wrong.append(f"the disk's fault is not named {ended.said[-600:]}")
    return wrong + ([f"no place is named {ended.said[-600:]}"] if str(here) not in said else [])


def make(made: Path) -> None:
    """Write a small model, requests, edits, a book, an adapter, a report and a recipe."""
    import families
    import worlds
    from remend.cli import run
    from remend.request import write_requests

    made.mkdir()
    for name, task in (("model", worlds.task(worlds.gpt2())), ("classifier", families.task("bert, binary"))):
        task.model.save_pretrained(made / name)
        task.processor.save_pretrained(made / name)
    requests = worlds.requests(10)
    parts = {"requests": requests[:6], "held_out": requests[7:9], "other": requests[6:7]}
    for name, part in parts.items():
        write_requests(made / f"{name}.jsonl", part)
    table = [f"{request.prompt},{request.target}" for request in requests[:3]]
    (made / "requests.csv").write_text("\n".join(["prompt,target", *table]) + "\n")
    for split, places in {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}.items():
        rows = [_fever_row(place) for place in places]
        (made / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        f"{_EDIT} --prompt Oslo-is --target Rome --out {{made}}/edit",
        f"{_EDIT} --prompt Lima-is --target Bern --out {{made}}/other_edit",
        "export {made}/edit --model {made}/model --to peft --out {made}/adapter",
        "book init {made}/book --model {made}/model",
        "book add {made}/book {made}/edit",
        "book init {made}/active_book --model {made}/model",
        "book add {made}/active_book {made}/edit",
        "book activate {made}/active_book 1 --force --model {made}/model --device cpu",
        _EVALUATE,
    ):
        arguments = [a.replace("-is", " is") for a in command.format(made=made, here=made).split()]
        if run(arguments) != 0:
            raise RuntimeError(arguments)
    shutil.copytree(made / "book", made / "left_book")
    run_in_fork("book add {here} {made}/other_edit", made / "left_book", made, AMID_ADDING, KILL)


def _fever_row(place: int) -> dict[str, Any]:
    """Return a row of FEVER in the form in which it is published."""
    import worlds

    country, city = worlds.COUNTRIES[place], worlds.CITIES[place]
    output = [{"answer": ("SUPPORTS", "REFUTES")[place % 2]}]
    rephrased = [f"It is {city} rules {country}"]
    return {"id": place, "input": f"{city} rules {country}", "output": output, "filtered_rephrases": rephrased}


def main() -> None:
    """Try all commands and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="commands whose name matches this")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    parser.add_argument(
        "--out", type=Path, help="a JSON file; the results of the commands that are tried replace those in it"
    )
    options = parser.parse_args()
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(_with_library(Path(folder)))
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = root / "made"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make(made)
        contents = Contents(made)
        for name, case in CASES.items():
            if options.only and not re.search(options.only, name):
                continue
            for fault in options.fault or FAULTS:
                start = time.perf_counter()
                every = fault == "kill" and name.startswith(KILLED)
                result = try_case(case, made, root, contents, fault, None if every else MOST)
                results.setdefault(name, {})[fault] = result
                print(f"{name}, {fault}: {result}, {time.perf_counter() - start:.0f} s", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(result["failures"] for faults in results.values() for result in faults.values()))


def _with_library(folder: Path) -> int:
    """Compile the library and run this program again with it loaded; return its exit code."""
    library = folder / "file_faults.so"
    source = Path(__file__).with_name("file_faults.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    settings = {LIBRARY: str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **settings}, check=False).returncode


if __name__ == "__main__":
    main()
