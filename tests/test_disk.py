"""What is written stays whole: processes are killed, and disks fail, at every operation on files."""

import errno
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import families
import remend
import worlds
from disk_faults import failing_at, killed_at, no_file_above
from remend import staging
from remend.apps.patch_registry import PatchRegistry
from remend.cli import run
from remend.edit import Edit
from remend.editors import Mend, MendConfig
from remend.errors import FileError, RemendError
from remend.evaluation.checkpoint import EvaluationCheckpoint
from remend.evaluation.reports.figure_style import save_figure
from remend.formats import load_adapter, save_adapter, save_merged
from remend.request import write_requests
from remend.saved_folders import write_json
from remend.training import TrainingConfig, train
from test_patch_registry import edits_of

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EROFS, "Read-only file system"),
]
CANNOT_EXCHANGE = pytest.mark.parametrize("exchanges", [True, False])


@pytest.fixture(scope="module")
def task():
    return families.task("llama")


@pytest.fixture(scope="module")
def edits(task):
    return edits_of(task.model, 2)


@pytest.fixture
def without_exchange(exchanges, monkeypatch):
    """A file system on which two folders cannot be exchanged in one step."""
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(function, *arguments):
    """What a function says that refuses, or nothing."""
    try:
        function(*arguments)
    except FileError as error:
        return str(error)
    return ""


def created(edit):
    return edit.requests[0].prompt


WRITERS = {
    "edit": (lambda edit, task, path: edit.save(path), lambda task, path: created(Edit.load(path))),
    "adapter": (
        lambda edit, task, path: save_adapter(edit, path, task),
        lambda task, path: float(next(iter(load_adapter(path, task).changes.values())).u[0, 0]),
    ),
    "json": (lambda edit, task, path: write_json(path, {"p": created(edit)}), lambda task, path: path.read_text()),
}


@CANNOT_EXCHANGE
@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_operation_leaves_the_old_content_or_the_new(
    writer, task, edits, tmp_path, exchanges, without_exchange
):
    write, read = WRITERS[writer]
    contents = []
    for edit in edits:
        write(edit, task, tmp_path / "out" / "it")
        contents.append(read(task, tmp_path / "out" / "it"))
    assert contents[0] != contents[1]
    for operation in itertools.count(1):
        folder = tmp_path / f"out-{operation}"
        write(edits[0], task, folder / "it")
        with killed_at(operation, folder) as struck:
            write(edits[1], task, folder / "it")
        if exchanges or writer != "adapter":  # other programs do not look for what was moved aside
            assert read(task, folder / "it") in contents, struck
        write(edits[1], task, folder / "other")  # the next run, whatever it writes
        assert listing(folder) == ["it", "other"], struck
        assert read(task, folder / "it") in contents, struck
        if not struck:
            break
    assert operation > 4
    assert read(task, folder / "it") == contents[1]


def test_a_merged_model_that_was_killed_leaves_nothing(task, edits, tmp_path):
    for operation in itertools.count(1):
        folder = tmp_path / f"out-{operation}"
        with killed_at(operation, folder) as struck:
            save_merged(edits[0], folder / "it", task)
        if folder.exists() and (folder / "it").exists():
            assert {"config.json", "model.safetensors"} <= set(listing(folder / "it"))
        edits[0].save(folder / "other")
        assert set(listing(folder)) <= {"it", "other"}, struck
        if not struck:
            break


def test_a_process_that_still_writes_is_left_alone(edits, tmp_path):
    program = "import sys, pathlib; from remend.staging import staging_folder\n"
    program += "with staging_folder(pathlib.Path(sys.argv[1])) as f: (f / 'new').mkdir(); print(f, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        folder = process.stdout.readline().strip()
        edits[0].save(tmp_path / "it")
        assert os.path.isdir(os.path.join(folder, "new"))
        process.kill()
        process.wait()
        edits[1].save(tmp_path / "it")
        assert listing(tmp_path) == ["it"]


def test_folders_of_other_programs_are_left_alone(edits, tmp_path):
    for name in (".remend-notes", ".remend-abcdefgh", ".it.abcdefgh", ".remend"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / ".remend-ijklmnop").symlink_to(tmp_path / ".remend")
    before = listing(tmp_path)
    edits[0].save(tmp_path / "it")
    assert listing(tmp_path) == sorted([*before, "it"])


def test_traps_of_others_in_a_shared_folder(edits, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("kept")
    for name in (".remend-abcdefgh", ".remend-ijklmnop"):
        (tmp_path / "shared" / name).mkdir(parents=True)
        (tmp_path / "shared" / name / "lock").touch()
    (tmp_path / "shared" / ".remend-abcdefgh" / "replaced").symlink_to(tmp_path / "home")
    edits[0].save(tmp_path / "shared" / "it")
    assert listing(tmp_path / "shared") == ["it"]
    assert (tmp_path / "home" / "mine.txt").read_text() == "kept"
    (tmp_path / "shared" / ".remend-abcdefgh").mkdir()
    (tmp_path / "shared" / ".remend-abcdefgh" / "lock").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    edits[0].save(tmp_path / "shared" / "it")
    assert listing(tmp_path / "shared") == [".remend-abcdefgh", "it"], "it is somebody else's"


def test_an_edit_may_be_replaced_while_it_is_read(edits, tmp_path):
    """Two edits take turns under one name; whoever reads it meanwhile finds one of them."""
    path = tmp_path / "it"
    edits[0].save(path)
    program = (
        "import sys; from remend.staging import rename_folder; import pathlib, shutil\n"
        "path = pathlib.Path(sys.argv[1]); spare = path.with_name('spare'); print(flush=True)\n"
        "for _ in range(100_000): rename_folder(spare, path)"
    )
    edits[1].save(tmp_path / "spare")
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            for _ in range(2_000):
                assert (path / "manifest.json").is_file()
        finally:
            process.kill()


def test_a_link_keeps_leading_to_what_is_written(edits, tmp_path):
    edits[0].save(tmp_path / "disk" / "it")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "it")
    edits[1].save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert created(Edit.load(tmp_path / "disk" / "it")) == created(edits[1])
    write_json("/dev/null", {})
    assert not os.path.isfile("/dev/null")


def test_what_is_written_can_be_read_by_others(task, edits, tmp_path):
    edits[0].save(tmp_path / "edit")
    save_adapter(edits[0], tmp_path / "adapter", task)
    save_merged(edits[0], tmp_path / "merged", task)
    (tmp_path / "own").write_text("")
    wanted = (tmp_path / "own").stat().st_mode & 0o666
    for file in tmp_path.rglob("*.*"):
        assert file.stat().st_mode & 0o666 == wanted, file


# -- the patch registry and training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [True, False])
def test_a_book_survives_a_kill_at_any_operation(task, edits, tmp_path, again):
    PatchRegistry.create(tmp_path / "empty", task.model).add(edits[0])
    for operation in itertools.count(1):
        shutil.copytree(tmp_path / "empty", tmp_path / "book")
        with killed_at(operation, tmp_path / "book") as struck:
            PatchRegistry(tmp_path / "book").add(edits[1])
        registry = PatchRegistry(tmp_path / "book")
        assert created(registry.load(1)) == created(edits[0])
        assert not [fault for fault in registry.verify() if fault.lost], struck
        if not struck:
            assert len(registry.entries) == 2
            break
        registry.add(edits[again])  # the same edit once more, or another one that is there already
        assert registry.verify() == [], struck
        assert len(registry.entries) == 2 if again else len(registry.entries) <= 2
        shutil.rmtree(tmp_path / "book")


def test_a_book_on_a_full_disk_is_whole(task, edits, tmp_path):
    PatchRegistry.create(tmp_path / "empty", task.model).add(edits[0])
    for operation in itertools.count(1):
        shutil.copytree(tmp_path / "empty", tmp_path / "book")
        registry = PatchRegistry(tmp_path / "book")
        with failing_at(operation, tmp_path / "book", FULL[0], afterwards=True) as struck:
            told = refusal(registry.add, edits[1])
        assert told == "" or "No space left on device" in told
        registry = PatchRegistry(tmp_path / "book")
        assert not [fault for fault in registry.verify(repair=True) if fault.lost], struck
        assert registry.verify() == [], struck
        if not struck:
            break
        shutil.rmtree(tmp_path / "book")


def train_in(folder, resume):
    editor = Mend.create(worlds.task(worlds.gpt2()), MendConfig(rank=4, alpha=1e-2))
    task = worlds.task(worlds.gpt2())
    settings = TrainingConfig(batch_size=2, max_steps=2, validate_every=1)
    requests = worlds.requests(12)
    held_out = [request for request in requests if request.subject in worlds.COUNTRIES[6:]]
    return train(
        task, requests[:6], held_out, config=settings, editor=editor, out=folder / "editor", resume=resume,
        checkpoint_minutes=0.0,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:no checkpoint was written", "ignore:a damaged checkpoint")
def test_a_training_survives_kills(tmp_path):
    """At some of its operations here; what is resumed ends with the same editor, bit for bit."""
    whole = train_in(tmp_path / "whole", resume=False)
    for operation in itertools.count(2, int(os.environ.get("STRIDE", "29"))):
        folder = tmp_path / f"run-{operation}"
        with killed_at(operation, folder) as struck:
            train_in(folder, resume=False)
        if (folder / "editor").exists():
            Mend.load(folder / "editor")
        editor = train_in(folder, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), editor.parameters(), strict=True)), struck
        assert listing(folder) == ["editor"], struck
        if not struck:
            break


@pytest.mark.parametrize("size", [0, 3000])
def test_a_training_on_a_full_disk_says_so(tmp_path, size):
    with no_file_above(size), pytest.raises(FileError, match="cannot write"):
        train_in(tmp_path, resume=False)
    assert not list(tmp_path.rglob(".remend-*"))


def test_only_checkpoints_are_deleted(tmp_path):
    mine = tmp_path / "editor.checkpoints" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("kept")
    train_in(tmp_path, resume=False)
    assert listing(tmp_path / "editor.checkpoints") == ["mine"]
    assert (mine / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "files",
    [
        {"about.json": '{"name": "my results"}', "single-0.json": "{}"},
        {"about.json": '{"about": "0"}', "notes.json": "{}"},
        {"about.json": "[]"},
        {"single-0.json": "{}"},
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_the_user_beside_a_report_is_not_removed(tmp_path, files, resume):
    folder = tmp_path / "r.json.partial"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(FileError, match="something else than parts of a stopped evaluation"):
        EvaluationCheckpoint(folder, "0", resume)
    assert {name: (folder / name).read_text() for name in listing(folder)} == files


def test_parts_of_an_evaluation_are_removed(tmp_path, edits):
    for _ in range(2):
        parts = EvaluationCheckpoint(tmp_path / "r.json.partial", "0")
        assert listing(tmp_path / "r.json.partial") == ["about.json"]
        parts.save_part("single-0", {})
        parts.save_edit(1, edits[0])
    (tmp_path / "r.json.partial" / "single-0.json").write_text("{")
    with pytest.raises(FileError, match=r"single-0\.json cannot be read"):
        EvaluationCheckpoint(tmp_path / "r.json.partial", "0", resume=True).load_part("single-0")
    parts.remove()
    assert listing(tmp_path) == []


# -- disks that are full, or read-only -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", FULL, ids=str)
@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fails_at_any_operation_is_named(writer, task, edits, tmp_path, error, afterwards):
    write, read = WRITERS[writer]
    write(edits[0], task, tmp_path / "it")
    before = read(task, tmp_path / "it")
    for operation in itertools.count(1):
        with failing_at(operation, tmp_path, error, afterwards) as struck:
            told = refusal(write, edits[0], task, tmp_path / "it")
        assert told == "" or error.strerror in told
        assert read(task, tmp_path / "it") == before, struck
        write(edits[0], task, tmp_path / "it")
        assert listing(tmp_path) == ["it"], struck
        if not struck:
            break


@pytest.mark.parametrize("size", [0, 100, 400])
def test_a_full_disk_is_named_whatever_library_writes(task, edits, tmp_path, size):
    path = tmp_path / "it"
    for write in (
        lambda: edits[0].save(path),
        lambda: save_adapter(edits[0], path, task),
        lambda: save_merged(edits[0], path, task),
        lambda: write_json(path, {"text": "x" * 3000}),
        lambda: PatchRegistry.create(path, task.model),
    ):
        with no_file_above(size), pytest.raises(RemendError, match=r"cannot (write|read or write)"):
            write()
        assert listing(tmp_path) == []


def test_plots_are_whole_or_not_there(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name, size in itertools.product(("a.png", "a.svg", "new/a.png"), (0, 1000)):
        with no_file_above(size), pytest.raises(FileError, match="cannot write"):
            save_figure(pyplot.figure(), tmp_path / name)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    save_figure(pyplot.figure(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_of_safetensors_is_a_sentence(edits, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise safetensors.SafetensorError(
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
        )

    monkeypatch.setattr(remend.saved_folders, "save_file", fail)
    with pytest.raises(FileError, match=r"No space left on device.*is unchanged"):
        edits[0].save(tmp_path / "it")
    assert listing(tmp_path) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model, requests, an edit and a book on disk."""
    made = tmp_path_factory.mktemp("small")
    task = worlds.task(worlds.gpt2())
    task.model.save_pretrained(made / "model")
    task.processor.save_pretrained(made / "model")
    write_requests(made / "requests.jsonl", worlds.requests(3))
    edits_of(task.model, 1)[0].save(made / "edit")
    PatchRegistry.create(made / "book", task.model).add(edits_of(task.model, 1)[0])
    return made


COMMANDS = {
    "edit": "edit {0}/model --editor finetune --requests {0}/requests.jsonl --keep-failed --out {1}/edit",
    "export": "export {0}/edit --model {0}/model --to peft --out {1}/adapter",
    "export merged": "export {0}/edit --model {0}/model --to merged --out {1}/merged",
    "book init": "book init {1}/new --model {0}/model",
    "book add": "book add {1}/book {0}/edit",
    "book activate": "book activate {1}/book 1 --force --model {0}/model",
    "book export": "book export {1}/book --revision 1 --to native --out {1}/all",
    "evaluate": "evaluate {0}/model --editor finetune --data {0}/requests.jsonl --limit 1 --json {1}/report.json",
}
SLOW = ("edit", "evaluate")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_a_read_only_disk_say_so(small, tmp_path, capsys, command):
    """The first, the third, … operation fails, and all that follow it."""
    for operation in (1, 3, 6, 10) if command not in SLOW else (2,):
        folder = tmp_path / str(operation)
        folder.mkdir()
        shutil.copytree(small / "book", folder / "book")
        arguments = COMMANDS[command].format(small, folder).split()
        with failing_at(operation, folder, FULL[2], afterwards=True) as struck:
            code = run([*arguments, *(["--device", "cpu"] if command in SLOW else [])])
        told = capsys.readouterr().err
        if struck:
            assert code == 1
            assert "FileError" in told
        else:
            break


def test_an_edit_that_appears_meanwhile_is_not_replaced(small, tmp_path, capsys, monkeypatch):
    def before_after(*arguments):
        shutil.copytree(small / "edit", tmp_path / "edit")
        return asked(*arguments)

    asked = remend.evaluation.before_after.before_after
    monkeypatch.setattr("remend.evaluation.before_after.before_after", before_after)
    assert run([*COMMANDS["edit"].format(small, tmp_path).split(), "--device", "cpu"]) == 1
    assert "holds an edit or an editor already" in capsys.readouterr().err
    assert created(Edit.load(tmp_path / "edit")) == created(Edit.load(small / "edit"))


def test_what_reads_or_writes_anywhere_else_is_a_sentence_too(small, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr("remend.edit.Edit.load", fail)
    assert run(["show", str(small / "edit")]) == 1
    assert "/somewhere: No space left on device" in capsys.readouterr().err
