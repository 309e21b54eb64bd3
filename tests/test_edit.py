"""Edits: applying, merging, reverting, adding, saving, and refusing what they were not made for."""

import copy
import functools
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import worlds
from remend.core.low_rank import LowRank
from remend.edit import EDIT_FORMAT, Edit
from remend.errors import EditError, FileError, PrecisionError, WrongBaseError
from remend.fingerprint import ModelFingerprint
from remend.serialization import MANIFEST, TENSORS

REQUESTS = worlds.requests(3)


@pytest.fixture
def edit(task, editor):
    return editor.edit(task, REQUESTS[:1])


def logits(task, model=None):
    """Logits on some text, with whatever is applied right now."""
    ids = torch.tensor([task.encode_input("The capital of Norway is Oslo")])
    with torch.no_grad():
        return (model or task.model)(ids).logits


def test_applied_and_merged_agree_and_both_leave_no_trace(task, edit, snapshot):
    before = logits(task)
    with edit.applied(task.model):
        applied = logits(task)
    torch.testing.assert_close(logits(task), before, rtol=0, atol=0)
    with edit.merge(task.model):
        merged = logits(task)
    snapshot()
    torch.testing.assert_close(applied, merged, rtol=1e-4, atol=1e-5)
    assert (applied - before).abs().max() > 1e-3, "the edit should show"


def test_an_exception_while_applied_leaves_no_trace(task, edit, snapshot):
    with pytest.raises(KeyError), edit.applied(task.model):
        raise KeyError
    snapshot()


def test_apply_and_revert_in_any_order(task, editor, snapshot):
    first, second = editor.edit_each(task, REQUESTS[:2])
    with second.applied(task.model):
        alone = logits(task)
    a, b = first.apply(task.model), second.apply(task.model)
    both = logits(task)
    a.revert()
    torch.testing.assert_close(logits(task), alone, rtol=0, atol=0)
    b.revert()
    b.revert()
    snapshot()
    with (first + second).applied(task.model):
        torch.testing.assert_close(logits(task), both, rtol=1e-4, atol=1e-5)


def test_an_edit_can_be_made_in_inference_mode(task, editor):
    with torch.inference_mode():
        inside = editor.edit(task, REQUESTS[:1])
    outside = editor.edit(task, REQUESTS[:1])
    assert all(torch.equal(inside.changes[name].u, change.u) for name, change in outside.changes.items())


def test_settings_of_decoding_and_loading_do_not_make_another_model(task, edit):
    task.model.config.pad_token_id = 7
    task.model.config.output_hidden_states = False
    before = logits(task)
    with edit.applied(task.model):
        assert not torch.equal(logits(task), before)


def test_several_requests_are_the_sum_of_each(task, editor):
    together = editor.edit(task, REQUESTS)
    apart = editor.edit_each(task, REQUESTS)
    total = apart[0] + apart[1] + apart[2]
    for name, change in together.changes.items():
        torch.testing.assert_close(change.dense(), total.changes[name].dense(), rtol=1e-4, atol=1e-5)
    assert together.requests == tuple(REQUESTS) == total.requests


def test_scaling_and_compression(task, edit):
    with edit.scaled(0.0).applied(task.model):
        off = logits(task)
    torch.testing.assert_close(off, logits(task), rtol=0, atol=1e-6)
    assert edit.scaled(2.0).norms() == pytest.approx({name: 2 * norm for name, norm in edit.norms().items()}, rel=1e-4)
    small = edit.compressed(1)
    assert {change.rank for change in small.changes.values()} == {1}
    assert all(small.norms()[name] <= norm * (1 + 1e-4) for name, norm in edit.norms().items())
    with pytest.raises(EditError, match="at least 1, not 0"):
        edit.compressed(0)
    whole = edit.compressed(max(change.rank for change in edit.changes.values()))
    assert set(whole.editor["lost"].values()) == {0.0}
    assert all(torch.equal(whole.changes[name].u, change.u) for name, change in edit.changes.items())


def test_an_edited_model_can_be_copied_and_the_copy_is_edited(task, edit):
    with edit.applied(task.model):
        copied = copy.deepcopy(task.model)
        edited = logits(task)
    torch.testing.assert_close(logits(task, copied), edited, rtol=0, atol=0)
    assert not torch.equal(logits(task), edited)


def test_another_model_is_refused_and_untouched(task, edit):
    family = "gpt2" if "gpt2" in type(task.model).__name__.lower() else "llama"
    reseeded = worlds.FAMILIES[family](seed=5)
    other = worlds.FAMILIES["llama" if family == "gpt2" else "gpt2"]()
    weights = {name: tensor.clone() for name, tensor in reseeded.state_dict().items()}
    with pytest.raises(WrongBaseError, match=r"weights of .* differ"):
        edit.apply(reseeded)
    with pytest.raises(WrongBaseError, match=r"another class or configuration \(class is .* here and .* there"):
        edit.merge(other)
    resized = copy.deepcopy(task.model)
    resized.resize_token_embeddings(task.model.config.vocab_size + 8)
    with pytest.raises(WrongBaseError, match=r"vocab_size is \d+ here and \d+ there\)\. The vocabulary was resized"):
        edit.apply(resized)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reseeded.state_dict().items())


def test_a_changed_weight_is_noticed_even_if_changed_in_place(task, edit):
    name, module = next((n, m) for n, m in task.model.named_modules() if n in edit.changes)
    with edit.applied(task.model):
        pass
    module.weight.data.mul_(1.01)  # .data hides the change from the version counter
    with pytest.raises(WrongBaseError, match=name):
        edit.apply(task.model)


def test_the_same_model_in_another_dtype_is_the_same_base(task, edit):
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(task.model).to(dtype)
        with edit.applied(other):
            assert torch.isfinite(logits(task, other)).all()


def test_bfloat16_keeps_an_edit_as_a_branch_and_refuses_to_merge_what_it_would_lose(task, edit):
    half = copy.deepcopy(task.model).to(torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    tiny = edit.scaled(1e-4)
    with pytest.raises(PrecisionError, match=r"would round away .* no weight was changed"):
        tiny.merge(half)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in half.state_dict().items())


def test_save_and_load(task, edit, tmp_path):
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert loaded.requests == edit.requests
    assert (loaded.base, loaded.created) == (edit.base, edit.created)
    assert dict(loaded.editor) == json.loads(json.dumps(dict(edit.editor)))
    with edit.applied(task.model):
        expected = logits(task)
    with loaded.applied(task.model):
        torch.testing.assert_close(logits(task), expected, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["edit"], "no temporary file is left"


def test_saving_again_replaces_and_foreign_folders_are_left_alone(edit, tmp_path):
    edit.save(tmp_path / "edit")
    edit.scaled(2.0).save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").norms() == pytest.approx(edit.scaled(2.0).norms())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match="was left alone"):
        edit.save(tmp_path / "mine")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "edit" / "notes.txt").write_text("mine")
    for folder in ("app", "edit"):
        with pytest.raises(FileError, match="was left alone"):
            edit.save(tmp_path / folder)
    assert (tmp_path / "edit" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "app" / "manifest.json").read_text() == '{"name": "my web app"}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "edit", "mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def truncated(folder):
    blob = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(blob[: len(blob) // 2])


def flipped(folder):
    blob = bytearray((folder / TENSORS).read_bytes())
    blob[-1] ^= 1
    (folder / TENSORS).write_bytes(blob)


def without(key):
    def change(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest[key]
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return change


def with_value(key, value):
    def change(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest[key] = value
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return change


def with_tensors(changed):
    """Writes other tensors, and their checksum into the manifest."""

    def change(folder):
        save_file({name: t.contiguous() for name, t in changed(load_file(folder / TENSORS)).items()}, folder / TENSORS)
        with_value("sha256", {TENSORS: hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()})(folder)

    return change


missing_factor = with_tensors(lambda tensors: dict(sorted(tensors.items())[1:]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated or altered"),
        (flipped, "truncated or altered"),
        (missing_factor, "missing or do not fit"),
        (lambda folder: (folder / TENSORS).unlink(), "is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "not a folder saved by remend"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not JSON"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 200_000), "not JSON"),
        (with_value("format", "remend.edit/99"), f"reads '{EDIT_FORMAT}'"),
        (with_value("sha256", None), "truncated or altered"),
        (with_value("requests", [{"prompt": ""}]), "malformed"),
        (with_value("requests", 3), "should be list"),
        (with_value("ranks", {}), "not those that the manifest lists"),
        (with_value("base", {"name": "x", "config": "y"}), "no 'weights'"),
        (with_value("editor", {"scale": "2"}), "'scale' of the editor should be a number"),
        (with_value("editor", {"name": 7}), "'name' should be str"),
        (with_value("editor", {"config": functools.reduce(lambda inner, _: [inner], range(200), 0)}), "100 deep"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": "a", "format": "b"}'), "'format' is given twice"),
        (with_tensors(lambda t: {n: x.int() for n, x in t.items()}), "stored as int32; allowed are float16"),
        (with_tensors(lambda t: {n: x > 0 for n, x in t.items()}), "stored as bool"),
        (with_tensors(lambda t: {n: x + 1j for n, x in t.items()}), "stored as complex64"),
        (with_tensors(lambda t: {n: x.new_empty(60_000, 0) for n, x in t.items()}), "matrix of 0 → 0"),
        (with_tensors(lambda t: {**t, "m.experts": torch.ones(1, dtype=torch.bool)}), "experts of m do not fit"),
        (without("base"), "no 'base'"),
        (without("created"), "no 'created'"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    small = {"m": LowRank(torch.ones(1, 2), torch.ones(1, 3))}
    Edit(small, ModelFingerprint("toy", "0", {"m": "0"}), tuple(REQUESTS[:1])).save(tmp_path / "edit")
    damage(tmp_path / "edit")
    with pytest.raises(FileError, match=message):
        Edit.load(tmp_path / "edit")


@pytest.mark.parametrize(
    ("u", "delta", "both"),
    [("float16", "bfloat16", "float32"), ("float64", "float16", "float64"), ("float8_e4m3fn", "bfloat16", "float32")],
)
def test_factors_of_two_dtypes_are_computed_with_in_one(u, delta, both, tmp_path):
    changes = {"m": LowRank(torch.ones(2, 3), torch.full((2, 4), 0.5))}
    Edit(changes, ModelFingerprint("toy", "0", {"m": "0"})).save(tmp_path / "edit")
    dtypes = {"m.u": getattr(torch, u), "m.delta": getattr(torch, delta)}
    with_tensors(lambda found: {name: x.to(dtypes[name]) for name, x in found.items()})(tmp_path / "edit")
    change = Edit.load(tmp_path / "edit").changes["m"]
    assert change.u.dtype == change.delta.dtype == getattr(torch, both)
    assert torch.equal(change.dense().float(), changes["m"].dense())


def test_an_edit_with_nan_is_never_made():
    non_finite = {"m": LowRank(torch.full((1, 2), float("nan")), torch.ones(1, 3))}
    with pytest.raises(EditError, match="NaN or infinity"):
        Edit(non_finite, ModelFingerprint("toy", "0", {"m": "0"}))


def test_edits_of_different_bases_do_not_add(edit):
    other = Edit(edit.changes, ModelFingerprint("other", "1", dict(edit.base.weights)))
    with pytest.raises(EditError, match="different bases"):
        edit + other


def test_a_task_has_the_identity_of_its_model(task, edit):
    assert ModelFingerprint.of(task, edit.changes) == ModelFingerprint.of(task.model, edit.changes) == edit.base
