"""Edits: applying, merging, reverting, adding, saving, and refusing what they were not made for."""

import copy
import functools
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import worlds
from remend.core.low_rank import LowRank
from remend.edit import EDIT_FORMAT, Edit
from remend.editors.ridge import Ridge
from remend.errors import EditError, FileError, ModelError, PrecisionError, WrongBaseError
from remend.fingerprint import ModelFingerprint
from remend.formats.merged_checkpoint import save_merged
from remend.formats.peft import load_adapter, save_adapter
from remend.saved_folders import MANIFEST, TENSORS, file_sha256, write_folder

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
        (
            with_tensors(lambda t: {n: x.new_empty(60_000, 0) for n, x in t.items()}),
            "matrix of 0 → 0, which is nothing",
        ),
        (with_tensors(lambda t: {n: x[:0] for n, x in t.items()}), "0 factor pairs of a matrix of 2 → 3"),
        (with_tensors(lambda t: {**t, "m.experts": torch.ones(1, dtype=torch.bool)}), "experts of m do not fit"),
        (with_tensors(lambda t: {**t, "m.keys": torch.ones(2, 2)}), "keys of m do not fit"),
        (with_tensors(lambda t: {**t, "m.keys": torch.full((1, 2), torch.nan)}), "keys of m do not fit"),
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


def tied_models():
    """Models with a matrix of several modules, and the name of a layer that has it."""
    tied = worlds.llama(tie_word_embeddings=True)
    yield tied, "lm_head"
    one_memory = worlds.llama()
    one_memory.lm_head.weight = torch.nn.Parameter(one_memory.model.embed_tokens.weight.data)
    yield one_memory, "lm_head"
    two_layers = worlds.llama()
    blocks = two_layers.model.layers
    blocks[3].mlp.down_proj.weight = blocks[2].mlp.down_proj.weight
    yield two_layers, "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("case", range(3))
def test_a_weight_of_several_modules_is_not_written(case, tmp_path):
    model, name = list(tied_models())[case]
    task, module = worlds.task(model), model.get_submodule(name)
    change = LowRank(torch.randn(2, module.in_features), torch.randn(2, module.out_features))
    edit = Edit({name: change}, ModelFingerprint.of(model, [name]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(EditError, match=rf"weight of {name} is also model\..*weight: merging would change"):
        edit.merge(model)
    with pytest.raises(EditError, match="is also"):
        save_merged(edit, tmp_path / "merged", task)
    assert not (tmp_path / "merged").exists()
    save_adapter(edit, tmp_path / "adapter", task)
    with pytest.raises(EditError, match=r"is also .* so it is not imported"):
        load_adapter(tmp_path / "adapter", task)
    with pytest.raises(ModelError, match="no editable module matches"):
        Ridge.create(task, modules=[name])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = logits(task)
    with edit.applied(model):  # a side branch acts on this use alone
        assert not torch.equal(logits(task), plain)


def test_an_output_layer_with_a_matrix_of_its_own_is_merged():
    model = worlds.llama()
    task = worlds.task(model)
    change = LowRank(0.1 * torch.randn(2, 16), 0.1 * torch.randn(2, model.lm_head.out_features))
    edit = Edit({"lm_head": change}, ModelFingerprint.of(model, ["lm_head"]))
    with edit.applied(model):
        applied = logits(task)
    with edit.merge(model):
        torch.testing.assert_close(logits(task), applied, rtol=1e-4, atol=1e-5)


def test_what_happens_to_the_file_after_loading_changes_nothing(task, edit, tmp_path):
    folder = edit.save(tmp_path / "edit")
    loaded = Edit.load(folder)
    (folder / TENSORS).write_bytes(b"\0" * (folder / TENSORS).stat().st_size)
    (folder / TENSORS).write_bytes(b"")
    for name, change in edit.changes.items():
        assert torch.equal(loaded.changes[name].u, change.u)
        assert torch.equal(loaded.changes[name].delta, change.delta)
    with edit.applied(task.model):
        applied = logits(task)
    with loaded.applied(task.model):
        assert torch.equal(logits(task), applied)


def test_factors_lie_in_memory_as_torch_lays_them(tmp_path):
    """The last bits of a product depend on addresses and strides: a saved and a loaded edit have the same."""
    memory = torch.randn(200)
    layouts = [
        (memory[1:7].view(2, 3), memory[11:19].view(2, 4)),
        (memory[:6].view(3, 2).T, memory[:24].view(2, 12)[:, ::3]),
        (memory[:3].expand(2, 3), memory[:8].view(2, 4)),
        (memory[:12].view(1, 3, 4)[:, :, 0], memory[4:8].view(1, 4)),
    ]
    for number, (u, delta) in enumerate(layouts):
        edit = Edit({"m": LowRank(u, delta)}, ModelFingerprint("toy", "0", {"m": "0"}))
        loaded = Edit.load(edit.save(tmp_path / str(number)))
        for held in (edit.changes["m"], loaded.changes["m"]):
            for factor, given in ((held.u, u), (held.delta, delta)):
                assert torch.equal(factor, given)
                assert factor.data_ptr() % 64 == 0
                assert factor.stride() == (factor.shape[-1], 1)


def test_a_sum_says_what_was_done_to_each_part(edit):
    assert (edit + edit).editor == edit.editor
    total = edit.scaled(2.0) + edit.scaled(0.5)
    assert [part["scale"] for part in total.editor["parts"]] == [2.0, 0.5]
    assert total.editor["name"] == edit.editor["name"]
    assert "scale" not in total.editor
    other = Edit(edit.changes, edit.base, (), {"name": "other", "scale": 3.0})
    both = total.scaled(4.0) + other
    assert both.editor["name"] == "sum"
    assert [part["scale"] for part in both.editor["parts"]] == [4.0, 3.0]
    assert len(both.editor["parts"][0]["parts"]) == 2


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_any_float_dtype_act(dtype, tmp_path):
    model = worlds.llama()
    task, name = worlds.task(model), "model.layers.3.mlp.down_proj"
    u, delta = torch.ones(2, 40).to(dtype), torch.ones(2, 16)
    for pair in ((u, delta.to(dtype)), (u, delta.to(torch.float16)), (u.float(), delta.to(dtype))):
        edit = Edit({name: LowRank(*pair)}, ModelFingerprint.of(model, [name]))
        assert edit.norms()[name] == pytest.approx(2 * 640**0.5, rel=1e-3)
        edit = Edit.load(edit.save(tmp_path / "edit")).scaled(0.5).compressed(1)
        with edit.applied(model):
            applied = logits(task)
        with torch.autocast("cpu", torch.bfloat16), edit.applied(model):
            logits(task)
        with edit.merge(model):
            torch.testing.assert_close(logits(task), applied, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_factors_that_are_no_floats_are_refused(dtype):
    base = ModelFingerprint("toy", "0", {"m": "0"})
    for factor in ("u", "delta"):
        change = LowRank(torch.ones(1, 2), torch.ones(1, 3))
        object.__setattr__(change, factor, getattr(change, factor).to(dtype))  # past the checks of annotations in tests
        with pytest.raises(EditError, match=r"the factors of the change of m are stored as .*; allowed are float16"):
            Edit({"m": change}, base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_file_with_factors_that_are_no_floats_is_refused(dtype, tmp_path):
    edit = Edit({"m": LowRank(torch.ones(1, 2), torch.ones(1, 3))}, ModelFingerprint("toy", "0", {"m": "0"}))
    tensors = {"m.u": torch.ones(1, 2), "m.delta": torch.ones(1, 3).to(dtype)}
    manifest = json.loads((edit.save(tmp_path / "edit") / MANIFEST).read_text())
    write_folder(tmp_path / "edit", manifest.pop("format"), {**manifest, "sha256": None}, tensors)
    with_value("sha256", {TENSORS: file_sha256(tmp_path / "edit" / TENSORS)})(tmp_path / "edit")
    with pytest.raises(FileError, match=r"the factors of m are stored as .*; allowed are"):
        Edit.load(tmp_path / "edit")


def test_factors_without_entries_are_refused():
    with pytest.raises(EditError, match="m would be a matrix of 0 → 3"):
        Edit({"m": LowRank(torch.ones(60_000, 0), torch.ones(60_000, 3))}, ModelFingerprint("toy", "0", {"m": "0"}))


def test_norms_are_not_those_of_half_precision(tmp_path):
    large = LowRank(torch.full((1, 100), 100.0).half(), torch.full((1, 100), 100.0).half())
    edit = Edit({"m": large}, ModelFingerprint("toy", "0", {"m": "0"}))
    assert edit.norms()["m"] == pytest.approx(1e6, rel=1e-3)
    assert Edit.load(edit.save(tmp_path / "edit")).norms() == edit.norms()


def test_what_a_weights_dtype_cannot_hold_is_not_merged():
    model = worlds.llama(num_hidden_layers=1).half()
    name = "model.layers.0.mlp.down_proj"
    change = LowRank(torch.full((1, 40), 300.0), torch.full((1, 16), 300.0))
    with pytest.raises(PrecisionError, match=r"exceeds what torch\.float16 can hold"):
        Edit({name: change}, ModelFingerprint.of(model, [name])).merge(model)
    assert model.get_submodule(name).weight.isfinite().all()


def test_an_edit_knows_whether_it_was_checked(edit, tmp_path):
    assert edit.taken is None
    assert "not checked" in repr(edit)
    for taken, told in ((True, "; taken;"), (False, "not taken")):
        checked = replace(edit, taken=taken, separators=(" ",))
        assert Edit.load(checked.save(tmp_path / str(taken))).taken is taken
        assert told in repr(checked)
        assert "targets after a space" in repr(checked)
        # Whatever is made of it is another edit, which nobody has asked.
        made = (checked.scaled(2.0), checked.compressed(1), checked + checked)
        assert [other.taken for other in made] == [None] * 3


def test_saved_requests_keep_keys_that_new_ones_may_not_have(edit, tmp_path):
    """Earlier releases took any key."""
    old = edit.requests[0].model_copy(update={"paraphrase": "It is", "target_as_given": "Oslo"})
    loaded = Edit.load(replace(edit, requests=(old,)).save(tmp_path / "edit"))
    assert loaded.requests[0].model_extra == {"paraphrase": "It is", "target_as_given": "Oslo"}


@pytest.mark.parametrize("factor", [0.0, 0.99, 1.01, 1e9])
def test_norms_in_a_manifest_that_are_not_those_of_the_factors_are_refused(factor, edit, tmp_path):
    folder = edit.save(tmp_path / "edit")
    manifest = json.loads((folder / MANIFEST).read_text())
    name = next(iter(manifest["norms"]))
    tensors = load_file(folder / TENSORS)
    for altered in ({**manifest["norms"], name: manifest["norms"][name] * factor}, {}, {**manifest["norms"], "x": 1.0}):
        write_folder(tmp_path / "altered", EDIT_FORMAT, {**manifest, "norms": altered}, tensors)
        with pytest.raises(FileError, match="altered"):
            Edit.load(tmp_path / "altered")
    Edit.load((edit + edit.scaled(-1.0)).save(tmp_path / "cancelled"))
