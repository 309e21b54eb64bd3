"""Files of every kind other than those of edits, editors and models: how each is written, read and judged."""

import functools
import gzip
import json
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import torch

import worlds
from remend.apps.acceptance import AcceptanceCriteria
from remend.apps.hub.evaluation_rows import evaluation_rows
from remend.apps.patch_registry import PatchRegistry
from remend.data import read_source
from remend.data.edit_sets import EditSet, SetItem
from remend.data.request_files import read_requests
from remend.data.text_files import read_text
from remend.editors import Mend, MendConfig, make
from remend.errors import FileError
from remend.evaluation import evaluate
from remend.evaluation.checkpoint import EvaluationCheckpoint
from remend.evaluation.reports.report_reader import read_report
from remend.recipes import load_recipe
from remend.recipes.recipe import RECIPE_FOLDER
from remend.request import EditRequest
from remend.tasks import load
from remend.training import Trainer, TrainingConfig, checkpoint
from tampering import same_function
from test_data import PLACES
from test_request_files import CONTAINERS

CRITERIA = {
    "must_change": [{"prompt": "a", "target": "b"}], "must_stay": ["c", {"prompt": "d", "target": "e"}], "takes": 1.0,
    "near": 0.5, "perplexity": {"text": ["f g"], "most": 1.5}, "size": 0.5,
}  # fmt: skip
ITEMS = (
    SetItem(item="phrasing", kind="statement", made="by rule", sure=0.9, prompt="a b"),
    SetItem(item="implication", kind="reverse", prompt="c", target="d", subject="e"),
    SetItem(item="near", prompt="f", answer="g"),
)
VERDICT = {
    "ok": False,
    "checks": [{"name": "takes", "measured": 0.5, "bound": 1.0, "ok": False, "count": 2, "failed": []}],
}


def file_kinds(task, requests, edit):
    """How a folder with a file of each other kind is written, and how it is read.

    Args:
        task: a small model.
        requests: at least eight requests that it can be edited with.
        edit: an edit of it.
    """

    def of_file(name, content, read):
        def write(folder):
            folder.mkdir()
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

        return write, lambda folder: read(folder / name)

    containers = {**CONTAINERS, "rows.jsonl": "".join(json.dumps(r.to_json()) + "\n" for r in requests)}
    containers = {name: text if isinstance(text, bytes) else text.encode() for name, text in containers.items()}
    containers |= {f"{name}.gz": gzip.compress(containers[name], mtime=0) for name in ("array.json", "table.csv")}
    if parquet := _parquet(requests):
        containers["table.parquet"] = parquet
    containers["set.jsonl"] = "\n".join(EditSet(requests[0], ITEMS).lines()).encode()
    kinds = {f"requests, {name}": of_file(name, content, read_rows) for name, content in containers.items()}
    for name, (row, _) in PLACES.items():
        source = name.partition(":")[0]
        reader = functools.partial(_read_data_set, source)
        kinds[f"data set, {name}"] = of_file("data.json", json.dumps([row]), reader)
    if find_spec("gguf"):
        kinds |= _gguf()
    recipe = (RECIPE_FOLDER / "distilgpt2.json").read_text(encoding="utf-8")
    return kinds | {
        "recipe": of_file("recipe.json", recipe, _read_recipe),
        "acceptance": of_file("acceptance.json", json.dumps(CRITERIA), _read_criteria),
        "report": (
            functools.partial(_write_report, task, requests),
            lambda folder: _read_report(folder / "report.json"),
        ),
        "verdict": of_file("verdict.json", json.dumps(VERDICT), evaluation_rows),
        "text": of_file("text.txt", "One line.\n\nAnother passage, é.\n", _read_passages),
        "book": (functools.partial(_write_book, task, edit), _read_book),
        "training": (functools.partial(_write_training, requests), functools.partial(_read_training, requests)),
        "evaluation": (functools.partial(_write_evaluation, edit), _read_evaluation),
    }


def read_rows(file):
    """Read requests, and write them as JSON and read that again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = read_requests(file)
    return _same_again(requests)


def _same_again(requests):
    assert requests
    assert all(EditRequest.from_json(json.dumps(request.to_json())) == request for request in requests)
    return requests


def _read_data_set(name, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _same_again(read_source(f"{name}:{file}"))


def _parquet(requests):
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        return b""
    stream = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": r.prompt, "target": r.target} for r in requests]), stream)
    return stream.getvalue().to_pybytes()


def _read_recipe(file):
    recipe = load_recipe(file)
    recipe.settings()
    again = type(recipe).model_validate_json(recipe.model_dump_json())
    assert again == recipe
    return recipe


def _read_criteria(file):
    criteria = AcceptanceCriteria.read(file)
    assert all(0 <= getattr(criteria, name) <= 1 for name in ("takes", "follows", "stays", "near", "far", "elsewhere"))
    assert criteria.size > 0
    return criteria


def _write_report(task, requests, folder):
    editor = make("ridge", task)
    report = evaluate(task, editor, requests[:2], max_new_tokens=2)
    folder.mkdir()
    report.save(folder / "report.json")


def _read_report(file):
    report = read_report(file)
    rows = evaluation_rows(file)
    assert rows
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))
    return report


def _read_passages(file):
    passages = read_text(file)
    assert all(passage.strip() for passage in passages)
    return passages


def _gguf():
    """A model file of llama.cpp."""
    import test_gguf

    model = test_gguf.small_llama().eval()

    def write(folder):
        folder.mkdir()
        test_gguf.write(folder / "model.gguf", model)

    def read(folder):
        found = load(str(folder / "model.gguf"), "cpu")
        assert same_function(SimpleNamespace(model=model), found)
        return found

    return {"gguf": (write, read)}


def _write_book(task, edit, folder):
    registry = PatchRegistry.create(folder, task.model)
    registry.add(edit)
    registry.set_state(1, "active")
    registry._database.engine.dispose()


def _read_book(folder):
    registry = PatchRegistry(folder)
    loaded = [registry.load(entry.id) for entry in registry.entries]
    assert len(loaded) == 1, "an edit is gone, and nothing said so"
    faults = [fault for fault in registry.verify() if fault.lost]
    if faults:
        raise FileError(f"{folder}: {faults[0].what}")
    registry.active()
    registry._database.engine.dispose()


def _trainer(requests):
    own = worlds.task(worlds.gpt2())
    editor = Mend.create(own, MendConfig(rank=4))
    return Trainer(own, editor, requests, TrainingConfig(batch_size=2, max_steps=2))


def _write_training(requests, folder):
    trainer = _trainer(requests)
    trainer.calibrate()
    trainer.train_step()
    history = [{"step": 1, "loss": 1.0, "edit": 1.0, "locality": 0.0, "taken": 0.5, "kept": 0.5, "seconds": 1.0}]
    best = {name: value.detach().clone() for name, value in trainer.editor.named_parameters()}
    checkpoint.save(folder, trainer, checkpoint.TrainingState(1.0, history, best, 1))


def _read_training(requests, folder):
    trainer = _trainer(requests)
    before = {name: value.clone() for name, value in trainer.editor.state_dict().items()}
    state = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a checkpoint that is passed over is one that was refused
            state = checkpoint.load(folder, trainer)
    except UserWarning as warning:
        raise FileError(str(warning)) from None
    finally:
        if state is None:
            assert all(torch.equal(before[name], value) for name, value in trainer.editor.state_dict().items())
    if state is None:
        raise FileError("there is no checkpoint")
    assert trainer.step == 1
    assert state.best.keys() == dict(trainer.editor.named_parameters()).keys()
    trainer.train_step()


def _write_evaluation(edit, folder):
    parts = EvaluationCheckpoint(folder, "0")
    parts.save_part("single-0", {"cases": []})
    parts.save_edit(1, edit)


def _read_evaluation(folder):
    parts = EvaluationCheckpoint(folder, "0", resume=True)
    return parts.load_part("single-0"), parts.load_edit(1)
