"""The patch registry: what is recorded, what acts, and what a crash or a tampered file leaves."""

import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

import families
import patch_registry_worker
import remend
from remend.apps.acceptance import AcceptanceCriteria, RejectedError, check_acceptance
from remend.apps.patch_registry import ConflictError, PatchRegistry
from remend.apps.patch_registry.database import active_after
from remend.cli import options, run
from remend.core.layers import dimensions
from remend.core.low_rank import LowRank
from remend.core.response import Response
from remend.edit import Edit
from remend.editors.locate_then_edit.fit import Fit, FitConfig
from remend.errors import EditError, FileError, RemendError, WrongBaseError
from remend.fingerprint import ModelFingerprint
from remend.models import editable_modules
from remend.request import EditRequest

LOOSE = AcceptanceCriteria(takes=0, follows=0, near=0, far=0, elsewhere=0, size=1e9)


@pytest.fixture(scope="module")
def task():
    return families.task("llama")


def edits_of(model, count):
    """Small changes of one matrix, each for a request of its own."""
    name, module = next(iter(editable_modules(model).items()))
    generator = torch.Generator().manual_seed(0)
    base = ModelFingerprint.of(model, [name])
    return [
        Edit(
            {name: LowRank(*(0.1 * torch.randn(1, d, generator=generator) for d in dimensions(module)))},
            base,
            (EditRequest(prompt=f"The capital of land {number} is", target="Paris"),),
        )
        for number in range(count)
    ]


@pytest.fixture
def registry(task, tmp_path):
    return PatchRegistry.create(tmp_path / "book", task.model)


def weights(model):
    """A hash of all that a model's weights are."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merged(registry, model, revision=None):
    """The hash of the weights that a revision gives."""
    edit = registry.edit(revision)
    if edit is None:
        return weights(model)
    with edit.merge(model):
        return weights(model)


# -- the record ------------------------------------------------------------------------------------------------------


def test_what_is_done_is_recorded(registry, task):
    one, other = edits_of(task.model, 2)
    first = registry.add(one, "a wrong capital", "ada")
    assert (first.id, first.state, first.who, first.why) == (1, "draft", "ada", "a wrong capital")
    assert first.requests[0]["target"] == "Paris"
    assert registry.add(one).id == 1, "the same edit is not added twice"
    assert registry.add(other).id == 2
    assert registry.edit() is None
    registry.set_state(2, "active", "urgent", "bob")
    registry.set_state(1, "active")
    registry.revert(2, "no more", "eve")
    assert [entry.state for entry in registry.entries] == ["active", "reverted"]
    assert [(event.edit, event.what, event.who) for event in registry.events[2:]][::2] == [
        (2, "activated", "bob"), (2, "reverted", "eve"),
    ]  # fmt: skip
    assert list(registry.active()) == [1]
    assert list(registry.active(3)) == [2]
    assert list(registry.active(4)) == [2, 1]
    assert registry.verify() == []
    again = PatchRegistry(registry.path)
    assert again.entries == registry.entries
    assert again.events == registry.events


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "manifest.json").unlink()])
def test_what_is_lost_can_be_added_again(registry, task, damage):
    edit = edits_of(task.model, 1)[0]
    registry.add(edit)
    registry.set_state(1, "active")
    damage(manifest(registry.path).parent)
    assert [fault.lost for fault in registry.verify()] == [True]
    with pytest.raises(FileError, match="or add the same edit again"):
        registry.load(1)
    assert (registry.add(edit).id, registry.entry(1).state) == (1, "active")
    assert registry.verify() == []
    with pytest.raises(FileError, match="is a patch registry already"):
        PatchRegistry.create(registry.path, task.model)


def test_a_past_state_has_the_same_bits(registry, task):
    for edit in edits_of(task.model, 4):
        registry.add(edit)
    draw, states = random.Random(0), {}
    for _ in range(20):
        entry = draw.choice(registry.entries)
        registry.set_state(entry.id, "reverted" if entry.state == "active" else "active")
        states[len(registry.events)] = merged(registry, task.model)
    assert len(set(states.values())) > 4
    again = PatchRegistry(registry.path)
    assert {revision: merged(again, task.model, revision) for revision in states} == states
    assert merged(again, task.model, 0) == weights(task.model)


def test_what_cannot_be_is_refused(registry, task, tmp_path):
    (edit,) = edits_of(task.model, 1)
    with pytest.raises(EditError, match="it has none yet"):
        registry.load(1)
    registry.add(edit)
    with pytest.raises(EditError, match="no edit 2: it has 1 to 1"):
        registry.set_state(2, "active")
    with pytest.raises(EditError, match="is draft"):
        registry.revert(1)
    with pytest.raises(EditError, match="revisions 0 to 1, not 9"):
        registry.active(9)
    with pytest.raises(WrongBaseError, match="is a patch registry of"):
        registry.add(edits_of(families.task("gpt2").model, 1)[0])
    with pytest.raises(FileError, match=r"is a patch registry already"):
        PatchRegistry.create(registry.path, task.model)
    with pytest.raises(FileError, match="is not a patch registry"):
        PatchRegistry(tmp_path)
    assert [event.what for event in registry.events] == ["added"]


# -- activation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def atlas():
    task = remend.load("atlas", "cpu")
    return task, remend.Mend.load("atlas")


def test_edits_that_do_not_add_up_do_not_act_together(atlas, tmp_path):
    """What acts is exported as one edit, so that a unit and a change of the same matrix cannot both act."""
    task, editor = atlas
    registry = PatchRegistry.create(tmp_path / "book", task.model)
    edit = editor.edit(task, [EditRequest(prompt="The capital of Canada is", target="Toronto")])
    gated = Edit(
        {
            name: LowRank(change.u, change.delta, Response("relu", threshold=0.5))
            for name, change in edit.changes.items()
        },
        edit.base,
        (EditRequest(prompt="The capital of Peru is", target="Cusco"),),
    )
    numbers = [registry.add(each).id for each in (edit, gated)]
    registry.activate(numbers[0], task, LOOSE)
    for force in (False, True):
        with pytest.raises(EditError, match=r"cannot act together with edit 1: .*different responses"):
            registry.activate(numbers[1], task, LOOSE, force=force)
    assert list(registry.active()) == [numbers[0]]
    assert registry.edit() is not None


def test_an_edit_that_contradicts_or_undoes_is_found_before_it_acts(atlas, tmp_path):
    task, editor = atlas
    registry = PatchRegistry.create(tmp_path / "book", task.model)
    first, other = (
        editor.edit(task, [EditRequest(prompt="The capital of Canada is", target=city)])
        for city in ("Toronto", "Vienna")
    )
    renamed = [EditRequest(prompt="Which city is the capital of Canada? It is", target="Vienna")]
    undoing = editor.edit(task, renamed).scaled(2.0)
    numbers = [registry.add(edit).id for edit in (first, other, undoing)]
    registry.activate(numbers[0], task, LOOSE)
    with pytest.raises(ConflictError, match="says 'Toronto'"):
        registry.activate(numbers[1], task, LOOSE)
    with pytest.raises(ConflictError, match="is undone: 'Vienna'"):
        registry.activate(numbers[2], task, LOOSE)
    assert list(registry.active()) == [numbers[0]]
    conflicts, _ = registry.activate(numbers[2], task, LOOSE, force=True)
    assert [conflict.kind for conflict in conflicts] == ["undoes"]
    assert registry.events[-1].measured["forced"]
    with pytest.raises(EditError, match="is active already"):
        registry.activate(numbers[2], task, LOOSE)
    assert not any(module._forward_hooks for module in task.model.modules())


def test_a_later_edit_replaces_those_that_it_contradicts(atlas, tmp_path):
    task, editor = atlas
    registry = PatchRegistry.create(tmp_path / "book", task.model)
    canada = [EditRequest(prompt="The capital of Canada is", target=city) for city in ("Toronto", "Vienna")]
    peru = EditRequest(prompt="The capital of Peru is", target="Cusco")
    first, later, both = (editor.edit(task, requests) for requests in (canada[:1], canada[1:], [canada[0], peru]))
    numbers = [registry.add(edit).id for edit in (first, later, both)]
    registry.activate(numbers[0], task, LOOSE)
    registry.activate(numbers[1], task, LOOSE, replace=True)
    assert list(registry.active()) == [numbers[1]]
    assert [event.why for event in registry.events[-2:]] == [f"replaced by edit {numbers[1]}", ""]
    assert registry.verify() == []
    # One that is contradicted in part is not lost as a whole.
    registry.revert(numbers[1])
    registry.activate(numbers[2], task, LOOSE)
    with pytest.raises(EditError, match="has 2 requests, of which 1 are contradicted"):
        registry.activate(numbers[1], task, LOOSE, replace=True)
    assert list(registry.active()) == [numbers[2]]


def test_edits_that_answer_at_each_other_s_keys_are_solved_for_together(tmp_path):
    """Whatever came between, the state is that of the edits that act, bit for bit."""
    task, requests = families.taught("llama"), families.requests("llama", 4)
    editor = Fit.create(task, FitConfig(kind="low-rank", steps=10), text=families.TEXT)
    registry = PatchRegistry.create(tmp_path / "book", task.model)
    numbers = [registry.add(edit).id for edit in editor.edit_each(task, requests)]
    for number in (numbers[0], numbers[2], numbers[3]):
        registry.activate(number, task, LOOSE, force=True)
    ((name, never_there),) = registry.edit().changes.items()
    for number in numbers[2:]:
        registry.revert(number)
    for number in (numbers[1], *numbers[2:]):
        registry.activate(number, task, LOOSE, force=True)
    together = registry.edit().changes[name].delta
    registry.revert(numbers[1])
    assert torch.equal(registry.edit().changes[name].delta, never_there.delta)
    assert not torch.allclose(together[[0, 2, 3]], never_there.delta)


def test_an_edit_that_is_not_accepted_does_not_act(atlas, tmp_path):
    task, editor = atlas
    registry = PatchRegistry.create(tmp_path / "book", task.model)
    request = EditRequest(prompt="The capital of Canada is", target="Toronto")
    number = registry.add(editor.edit(task, [request]).scaled(0.0)).id
    with pytest.raises(RejectedError, match="get their answers"):
        registry.activate(number, task)
    assert registry.entry(number).state == "draft"
    assert [event.what for event in registry.events] == ["added"]


def test_what_changes_meanwhile_is_measured_anew(atlas, tmp_path, monkeypatch):
    import remend.apps.patch_registry.registry as registry_module

    task, editor = atlas
    registry = PatchRegistry.create(tmp_path / "book", task.model)
    prompts = ("The capital of Canada is", "The capital of Peru is")
    made = [editor.edit(task, [EditRequest(prompt=p, target="Toronto")]) for p in prompts]
    one, other = (registry.add(edit).id for edit in made)
    counts = []

    def slow(*arguments, **named):
        counts.append(len(arguments[3]))
        if len(counts) == 1:
            PatchRegistry(registry.path).set_state(other, "active")  # another process is quicker
        return check_acceptance(*arguments, **named)

    monkeypatch.setattr(registry_module, "check_acceptance", slow)
    registry.activate(one, task, LOOSE)
    assert counts == [0, 1], "the second time with the other one beneath"
    assert list(registry.active()) == [other, one]


# -- crashes and several processes -----------------------------------------------------------------------------------


def test_a_folder_without_a_record(registry, task):
    one, other = edits_of(task.model, 2)
    registry.add(one)
    other.save(registry.path / "edits" / "left")
    assert [entry.id for entry in registry.entries] == [1]
    (fault,) = registry.verify()
    assert "left behind" in fault.what
    assert not fault.lost
    assert len(list((registry.path / "edits").iterdir())) == 2
    assert [fault.repaired for fault in registry.verify(repair=True)] == [True]
    assert registry.verify() == []
    assert registry.add(other).id == 2


def test_an_edit_that_was_not_recorded_leaves_nothing(registry, task, monkeypatch):
    one, other = edits_of(task.model, 2)
    registry.add(one)
    monkeypatch.setattr(registry._database, "add_edit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        registry.add(other)
    monkeypatch.undo()
    assert [entry.id for entry in registry.entries] == [1]
    assert len(list((registry.path / "edits").iterdir())) == 1
    assert registry.verify() == []


def test_what_remend_did_not_write_is_not_removed(registry, task):
    registry.add(edits_of(task.model, 1)[0])
    notes = registry.path / "edits" / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    (fault,) = registry.verify(repair=True)
    assert "move it elsewhere" in fault.what
    assert not fault.repaired
    assert (notes / "mine.txt").exists()


def run_worker(context, arguments, kill_at, draw):
    """Run a worker to its end, and kill it once in each operation of ``kill_at``.

    It starts no operation before it is told to, so every kill happens; where in the operation it strikes is by chance.
    """
    kill_at, finished = set(kill_at), False
    while not finished:
        ours, its = context.Pipe()
        process = context.Process(target=patch_registry_worker.work, args=(its, *arguments))
        process.start()
        its.close()  # so that the end of the process ends the connection
        with ours, contextlib.suppress(EOFError):
            while True:
                number = ours.recv()
                ours.send("go")
                if number in kill_at:
                    kill_at.remove(number)
                    time.sleep(draw.uniform(0, 0.03))
                    process.kill()
                    break
        process.join()
        finished = process.exitcode == 0
        assert finished or process.exitcode == -signal.SIGKILL, "it failed by itself"
    assert not kill_at


def test_a_thousand_operations_of_four_processes_with_twelve_kills_lose_nothing(task, tmp_path):
    """Whatever a process reported as done is in the registry, and nothing is half done."""
    folder, operations, kills = tmp_path / "edits", 250, 3
    for number, edit in enumerate(edits_of(task.model, 40)):
        edit.save(folder / f"{number:02d}")
    registry = PatchRegistry.create(tmp_path / "registry", task.model)
    draw = random.Random(1)
    # One process imports the package, and every worker is a fork of it: an import takes longer than a worker's work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remend.apps.patch_registry"])
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(
                run_worker,
                context,
                (registry.path, folder, seed, operations),
                draw.sample(range(operations - 1), kills),  # after the last one it would end, killed or not
                random.Random(seed),
            )
            for seed in range(4)
        ]
        for worker_run in runs:
            worker_run.result()
    assert not [fault for fault in registry.verify(repair=True) if fault.lost]
    assert registry.verify() == []
    done = [line.split() for seed in range(4) for line in (tmp_path / f"done-{seed}").read_text().splitlines()]
    assert len(done) == 1000
    events = registry.events
    reported = {kind: sum(result == kind for result, _ in done) for kind in ("add", "active", "reverted")}
    recorded = {kind: sum(event.what == kind for event in events) for kind in ("added", "activated", "reverted")}
    assert recorded["added"] == len(registry.entries) <= 40
    for kind, what in (("active", "activated"), ("reverted", "reverted")):
        assert reported[kind] <= recorded[what] <= reported[kind] + 4 * kills, "one unreported operation a kill at most"
    for revision in sorted(draw.sample(range(len(events)), 5)):
        assert merged(registry, task.model, revision) == merged(PatchRegistry(registry.path), task.model, revision)
        assert set(registry.active(revision)) == set(active_after(events, revision))


# -- tampering -------------------------------------------------------------------------------------------------------


def statement(text):
    """Changes the database of a registry."""

    def change(path):
        with sqlite3.connect(path / "book.sqlite") as connection:
            connection.execute(text)
        connection.close()

    return change


def manifest(path):
    return next(path.glob("edits/*/manifest.json"))


def replaced(find, by):
    return lambda path: manifest(path).write_text(manifest(path).read_text().replace(find, by))


def linked(path):
    folder = manifest(path).parent
    shutil.move(folder, path.parent / "outside")
    folder.symlink_to(path.parent / "outside")


TAMPERED = {
    "another target": (replaced("Paris", "Rome"), "manifest was altered"),
    "an edit that is gone": (lambda path: shutil.rmtree(manifest(path).parent), "is gone"),
    "tensors of another": (lambda path: manifest(path).with_name("tensors.safetensors").write_bytes(b"0"), "sha256"),
    "a link out of the book": (linked, "is a link"),
    "a state without a history": (statement("UPDATE edits SET state = 'active'"), "history says otherwise"),
    "an unknown state": (statement("UPDATE edits SET state = 'secret'"), "malformed"),
    "a path for a hash": (statement("UPDATE edits SET file = '../../etc'"), "malformed"),
    "requests that are none": (statement("UPDATE edits SET requests = '7'"), "requests of edit 1"),
    "requests that are no JSON": (statement("UPDATE edits SET requests = '{'"), "altered"),
    "an unknown event": (statement("UPDATE events SET what = 'sold'"), "event 1"),
    "an event that is gone": (statement("DELETE FROM events"), "history says otherwise"),
    "a table that is gone": (statement("DROP TABLE events"), "damaged or was altered"),
    "other requests in the record": (
        statement("UPDATE edits SET requests = replace(requests, 'Paris', 'Rome')"),
        "other requests than the edit's",
    ),
    "fewer requests in the record": (statement("UPDATE edits SET requests = '[]'"), "other requests than the edit's"),
    "who added it": (statement("UPDATE edits SET who = 'eve'"), "disagree on who added it, when or why"),
    "when it was added": (statement("UPDATE events SET at = '1999-01-01'"), "disagree on who added it, when or why"),
    "why it was added": (statement("UPDATE events SET why = 'fun'"), "disagree on who added it, when or why"),
    "a base of another model": (statement(f"UPDATE book SET config = '{'0' * 64}'"), "another configuration"),
    "a record that is gone": (statement("DELETE FROM edits"), "edit 1, which is not recorded"),
    "a record of another number": (statement("UPDATE edits SET id = 7"), "the numbers of the edits have gaps"),
    "an event that cannot follow": (
        statement("INSERT INTO events VALUES (2, 1, 'reverted', '', '', '', 'null')"),
        "was reverted while it was draft",
    ),
    "measurements where nothing was measured": (
        statement("UPDATE events SET measured = '{}'"),
        "is no activation, and records measurements",
    ),
    "a trigger": (
        statement("CREATE TRIGGER t AFTER INSERT ON events BEGIN UPDATE events SET why = 'fun'; END"),
        "trigger 't'",
    ),
    "a view": (statement("CREATE VIEW v AS SELECT * FROM edits"), "view 'v'"),
    "another table": (statement("CREATE TABLE more (id INTEGER)"), "table 'more'"),
    "another index": (statement("CREATE INDEX i ON edits (why)"), "index 'i'"),
    "another column": (statement("ALTER TABLE edits ADD COLUMN more"), "table 'edits'"),
    "a table as a view": (
        lambda path: [
            statement("ALTER TABLE events RENAME TO more")(path),
            statement("CREATE VIEW events AS SELECT * FROM more")(path),
        ],
        "was altered",
    ),
    "a link for a journal": (
        lambda path: (path / "book.sqlite-journal").symlink_to(path / "book.sqlite"),
        "is a link",
    ),
    "another version": (statement("UPDATE book SET version = 9"), "version 9"),
    "no model": (statement("DELETE FROM book"), "which model"),
    "no database": (lambda path: (path / "book.sqlite").write_bytes(b"nonsense" * 100), "damaged or was altered"),
    "half a database": (
        lambda path: (path / "book.sqlite").write_bytes((path / "book.sqlite").read_bytes()[:5000]),
        "damaged|malformed|altered",
    ),
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_a_book_that_was_tampered_with_says_so(registry, task, tampered):
    registry.add(edits_of(task.model, 1)[0])
    registry._database.engine.dispose()
    change, message = TAMPERED[tampered]
    change(registry.path)
    try:
        faults = PatchRegistry(registry.path).verify()
    except RemendError as error:
        said = str(error)
    else:
        assert any(fault.lost for fault in faults)
        said = " ".join(fault.what for fault in faults)
    assert any(part in said for part in message.split("|")), said


VERDICT = {
    "checks": [{"name": "takes", "measured": 1.0, "bound": 0.9, "ok": True}], "missing": [], "unmet": [], "ok": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"forced": True}, None),
        ({"conflicts": [{}]}, "against its verdict"),
        ({"verdict": {**VERDICT, "ok": False}}, "do not give its verdict"),
        ({"verdict": {**VERDICT, "unmet": ["near"]}}, "do not give its verdict"),
        ({"verdict": {**VERDICT, "unmet": ["near"], "ok": False}}, "against its verdict"),
        ({"verdict": {**VERDICT, "checks": [{**VERDICT["checks"][0], "measured": 0.5}]}}, "the result of a check"),
        ({"verdict": {**VERDICT, "checks": [{**VERDICT["checks"][0], "name": "size"}]}}, "the result of a check"),
        ({"verdict": {}}, "malformed"),
        ({"verdict": 7}, "malformed"),
    ],
)
def test_measurements_that_were_altered(registry, task, changes, fault):
    registry.add(edits_of(task.model, 1)[0])
    registry.set_state(1, "active", measured={"verdict": VERDICT, "conflicts": [], "forced": False, **changes})
    faults = [found.what for found in registry.verify()]
    assert faults == [] if fault is None else fault in faults[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [("disk full", "the disk is full"), ("i/o", "reports an error"), ("read-only", "is read-only")],
)
def test_a_disk_that_fails_is_named(registry, task, monkeypatch, error, message):
    """And not the book, which is whole."""
    code = {"disk full": sqlite3.SQLITE_FULL, "i/o": sqlite3.SQLITE_IOERR_WRITE, "read-only": sqlite3.SQLITE_READONLY}
    registry.add(edits_of(task.model, 1)[0])

    def fail(*arguments, **named):
        failure = sqlite3.OperationalError(error)
        failure.sqlite_errorcode = code[error]
        raise DBAPIError("INSERT", {}, failure)

    monkeypatch.setattr(registry._database, "add_event", fail)
    with pytest.raises(FileError, match=f"{message}.*What was recorded is unchanged"):
        registry.set_state(1, "active")
    monkeypatch.undo()
    assert registry.entry(1).state == "draft"
    assert registry.verify() == []


def test_a_database_that_may_grow_no_more(registry, task):
    """SQLite itself reports a full disk, and rolls back."""
    registry.add(edits_of(task.model, 1)[0])
    with registry._database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    limit = lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}")  # noqa: E731
    event.listen(registry._database.engine, "connect", limit)
    registry._database.engine.dispose()
    with pytest.raises(FileError, match="the disk is full"):
        registry.set_state(1, "active", why="x" * 100_000)
    assert registry.entry(1).state == "draft"
    assert PatchRegistry(registry.path).verify() == []


def test_bytes_of_a_book_that_were_changed_at_random(registry, task, tmp_path):
    """Whatever is read of it is what was written, or it is refused in words; nothing of it is written."""
    for edit in edits_of(task.model, 3):
        registry.add(edit)
    registry.set_state(1, "active")
    registry._database.engine.dispose()
    good = (registry.path / "book.sqlite").read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        content = bytearray(good)
        for _ in range(draw.randint(1, 30)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (registry.path / "book.sqlite").write_bytes(bytes(content))
        try:
            tried = PatchRegistry(registry.path)
            for entry in tried.entries:
                tried.load(entry.id)
            tried.active()
        except RemendError:
            pass
    (registry.path / "book.sqlite").write_bytes(good)
    assert PatchRegistry(registry.path).verify() == []


# -- the commands ----------------------------------------------------------------------------------------------------


def test_a_folder_s_name_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, capsys):
    task = families.task("llama")
    task.model.save_pretrained(tmp_path / "small")
    task.processor.save_pretrained(tmp_path / "small")
    loaded = remend.load(str(tmp_path / "small"))
    remend.editors.make("finetune", loaded).edit(loaded, families.requests("llama", 1)).save(tmp_path / "edit")
    monkeypatch.chdir(tmp_path)
    assert run(["book", "init", "book", "--model", "./small"]) == 0
    assert run(["book", "add", "book", "edit"]) == 0
    monkeypatch.setattr(options, "load_model", lambda *given: pytest.fail("it was looked for"))
    monkeypatch.chdir(tmp_path.parent)
    assert run(["book", "activate", str(tmp_path / "book"), "1"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "the edit is for a model that was in a folder 'small': say with --model where it is" in told


def test_a_book_by_command(atlas, tmp_path, capsys):
    task, editor = atlas
    request = remend.read_source("atlas:validation")[3]
    editor.edit(task, [request]).save(tmp_path / "edit")
    registry = str(tmp_path / "book")
    assert run(["book", "init", registry, "--model", "atlas"]) == 0
    assert run(["book", "add", registry, str(tmp_path / "edit"), "--why", "ticket 7"]) == 0
    assert run(["book", "export", registry, "--to", "native", "--out", str(tmp_path / "none")]) == 1
    assert run(["book", "activate", registry, "1", "--why", "approved"]) == 0
    assert "acts" in capsys.readouterr().out
    assert run(["book", "activate", registry, "1"]) == 1
    assert run(["book", "list", registry]) == 0
    assert run(["book", "show", registry, "1"]) == 0
    assert run(["book", "history", registry]) == 0
    told = capsys.readouterr().out
    assert "ticket 7" in told
    assert "accepted" in told
    assert run(["book", "export", registry, "--to", "peft", "--out", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert run(["book", "revert", registry, "1"]) == 0
    assert run(["book", "verify", registry]) == 0
    (tmp_path / "book" / "edits" / "left").mkdir()
    assert run(["book", "verify", registry]) == 1
    assert run(["book", "verify", registry, "--repair"]) == 0
    assert run(["book", "export", registry, "--to", "native", "--out", str(tmp_path / "past"), "--revision", "2"]) == 0
    assert json.loads((tmp_path / "past" / "manifest.json").read_text())["requests"][0]["prompt"] == request.prompt
