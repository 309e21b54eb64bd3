"""What every editor keeps to, on a decoder, an encoder-decoder and a classifier; a new editor is a new line here."""

import dataclasses
from operator import attrgetter

import pytest
import torch

import families
import worlds
from remend.core.low_rank_hooks import frozen
from remend.edit import Edit
from remend.editors import EDITORS, editor_class, load_edit, load_trained, make, trained_names
from remend.editors.context_edit import ContextEdit
from remend.errors import EditError, FileError, RequestError, WrongBaseError
from remend.training import TrainingConfig, train

# Of a classifier with two labels, every second request is answered already.
pytestmark = pytest.mark.filterwarnings("ignore:.*edits? changes? nothing. the model answers so already")

TRAINED = trained_names()
UNTRAINED = [name for name in EDITORS.names() if name not in TRAINED]
KINDS = {"decoder": "gpt2", "encoder-decoder": "t5", "classifier": "bert, binary"}
OTHER = {"decoder": "llama", "encoder-decoder": "bart", "classifier": "roberta, binary"}
TEXT = [request.prompt for request in worlds.requests(20)] + [
    f"{request.paraphrases[0]} {request.target}" for request in worlds.requests(20)
]
UNHEARD = ("in-context", "rome", "memit", "fit", "mend-subject")
"""A random model cannot read what it is told, and its answer hardly hears of the subject: a trained one's does."""
SETTINGS = TrainingConfig(
    batch_size=4, learning_rate=1e-3, alpha_learning_rate=1e-2, edit_weight=1.0, max_steps=12, validate_every=6
)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=EDITORS.names())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def world(kind):
    """The task and some requests."""
    return families.task(KINDS[kind]), families.requests(KINDS[kind], 20)


@pytest.fixture(scope="module")
def editor(name, world):
    task, requests = world
    skip_unless_editable(name, task)
    return make_editor(name, task, requests)


def skip_unless_editable(name, task):
    if missing := [need for need in editor_class(name).info.requires if not attrgetter(need)(task)]:
        pytest.skip(f"{name} requires a task that is {missing[0]}, and {task.kind} is not")


def make_editor(name, task, requests):
    if name in UNTRAINED:
        return make(name, task, TEXT if editor_class(name).info.needs == "text" else ())
    return train(
        task,
        requests[:14],
        requests[14:],
        config=SETTINGS,
        editor=editor_class(name).create(task),
        allow_shared=("subjects", "prompts"),
    )


def probabilities(task, requests, edit=None):
    """The log probability of each request's target, told or edited as ``edit`` wants it."""
    prompts = [request.prompt for request in requests]
    if isinstance(edit, ContextEdit):
        prompts = [edit.with_facts(task, prompt, 8) or prompt for prompt in prompts]
    batch = task.collate([task.encode(p, r.target) for p, r in zip(prompts, requests, strict=True)])
    with frozen(task.model), torch.no_grad():
        if edit is None or isinstance(edit, ContextEdit):
            return -task.loss(batch)
        with edit.applied(task.model):
            return -task.loss(batch)


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [p.grad is None for p in model.parameters()]
    wanted = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    return hooks, grads, [m.training for m in model.modules()], wanted


def same_state(one, other):
    assert one[:3] == other[:3]
    for (wanted, before), (wants, after) in zip(one[3], other[3], strict=True):
        assert wanted == wants
        assert torch.equal(before, after)


def test_an_editor_says_what_it_is(name):
    info = editor_class(name).info
    assert info.name == name
    assert info.source
    assert info.needs == EDITORS.get(name).needs
    assert info.needs in ("nothing", "text", "training")
    assert (info.needs == "training") == (name in TRAINED)
    assert info.result in ("low-rank", "dense", "outside")


def test_edits_take_and_leave_the_model_alone(editor, world, name):
    task, requests = world
    before = state_of(task.model)
    edits = editor.edit_each(task, requests[:6])
    same_state(before, state_of(task.model))
    plain = probabilities(task, requests[:6])
    edited = torch.stack([probabilities(task, [r], e)[0] for r, e in zip(requests[:6], edits, strict=True)])
    answers = task.predict([request.prompt for request in requests[:6]], 4)
    wrong = torch.tensor([task.encode(r.prompt, r.target).target != a for r, a in zip(requests, answers, strict=False)])
    assert wrong.sum() >= 3
    if name not in UNHEARD:
        assert (edited > plain)[wrong].float().mean() >= 0.8, (plain, edited)
    for edit, request in zip(edits, requests[:6], strict=True):
        assert edit.requests == (request,)
    assert torch.equal(probabilities(task, requests[:6]), plain)


def test_one_edit_is_the_edit_of_one(editor, world):
    task, requests = world
    alone = editor.edit(task, requests[1:2])
    among = editor.edit_each(task, requests[:3])[1]
    found = [probabilities(task, requests[:3], edit) for edit in (alone, among)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_several_requests_are_one_edit(editor, world, name):
    task, requests = world
    some = requests[1:6:2]  # of a binary classifier: all of the label that it does not give
    edit = editor.edit(task, some)
    assert edit.requests == tuple(some)
    if name in UNTRAINED and name not in UNHEARD:
        assert (probabilities(task, some, edit) > probabilities(task, some)).all()


def test_the_same_edit_again(editor, world):
    task, requests = world
    found = [probabilities(task, requests[:4], editor.edit(task, requests[:2])) for _ in "12"]
    assert torch.equal(*found)


def test_edits_come_off_bit_for_bit(editor, world, name):
    task, requests = world
    edit = editor.edit(task, requests[:2])
    before, plain = state_of(task.model), probabilities(task, requests[:4])
    if isinstance(edit, ContextEdit):
        with pytest.raises(EditError, match="changes prompts, not the model"):
            edit.apply(task.model)
        return
    handle = edit.apply(task.model)
    changed = probabilities(task, requests[:4])
    assert not torch.equal(changed, plain)
    handle.revert()
    handle.revert()  # twice does no harm
    same_state(before, state_of(task.model))
    assert torch.equal(probabilities(task, requests[:4]), plain)
    if isinstance(edit, Edit):
        with edit.merge(task.model):
            torch.testing.assert_close(probabilities(task, requests[:4]), changed, rtol=1e-3, atol=1e-3)
        same_state(before, state_of(task.model))
    assert isinstance(edit, Edit) == (editor_class(name).info.result != "outside")


def test_edits_are_saved_and_read_back(editor, world, tmp_path):
    task, requests = world
    edit = editor.edit(task, requests[:2])
    edit.save(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    assert type(again) is type(edit)
    assert again.requests == edit.requests
    assert torch.equal(probabilities(task, requests[:4], again), probabilities(task, requests[:4], edit))
    (tmp_path / "edit" / "manifest.json").write_text("{}")
    with pytest.raises(FileError):
        load_edit(tmp_path / "edit")


def test_edits_add_up(editor, world):
    task, requests = world
    one, other = editor.edit_each(task, requests[:2])
    if editor.info.sequence == "all":
        with pytest.raises(EditError, match="would count twice"):
            one + other
        return
    both = one + other
    assert both.requests == tuple(requests[:2])
    probabilities(task, requests[:2], both)


def test_another_model_is_refused(editor, world, kind):
    task, requests = world
    other = families.task(OTHER[kind])
    with pytest.raises(WrongBaseError, match="another"):
        editor.edit(other, requests[:1])
    edit = editor.edit(task, requests[:1])
    if not isinstance(edit, ContextEdit):
        before = state_of(other.model)
        with pytest.raises(WrongBaseError):
            edit.apply(other.model)
        same_state(before, state_of(other.model))


@pytest.mark.parametrize("wrong", [[], "The capital", worlds.requests(1)[0], [None]])
def test_what_is_no_list_of_requests(editor, world, wrong):
    task, _ = world
    with pytest.raises(Exception, match=r"at least one EditRequest|violates type hint") as caught:
        editor.edit(task, wrong)
    assert isinstance(caught.value, RequestError) or "TypeCheckError" in type(caught.value).__name__


def test_a_request_that_does_not_fit(editor, world, kind):
    task, requests = world
    if task.context is None:
        pytest.skip(f"this {kind} has relative positions: no prompt is too long")
    long = requests[0].model_copy(update={"prompt": "The capital of " * 200})
    before = state_of(task.model)
    with pytest.raises(RequestError, match="context"):
        editor.edit(task, [requests[1], long])
    same_state(before, state_of(task.model))


def test_within_inference_mode(editor, world):
    task, requests = world
    plain = editor.edit(task, requests[:1])
    with torch.inference_mode():
        edit = editor.edit(task, requests[:1])
    assert torch.equal(probabilities(task, requests[:2], edit), probabilities(task, requests[:2], plain))


@pytest.mark.parametrize("name", TRAINED, indirect=True)
def test_trained_editors_are_saved_and_read_back(editor, world, name, tmp_path):
    task, requests = world
    editor.save(tmp_path / "editor")
    again = load_trained(tmp_path / "editor")
    assert type(again) is type(editor)
    assert again.trained == editor.trained
    found = [probabilities(task, requests[:4], e.edit(task, requests[:2])) for e in (editor, again)]
    assert torch.equal(*found)
    for other in set(TRAINED) - {name}:
        with pytest.raises(FileError, match=f"holds the editor '{name}', not '{other}'"):
            editor_class(other).load(tmp_path / "editor")


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "mend"], indirect=True)
def test_a_stopped_training_goes_on(world, name, tmp_path):
    """A run that is interrupted and gone on with ends with the editor of a run that was not."""
    task, requests = world
    skip_unless_editable(name, task)
    options = {"config": SETTINGS, "allow_shared": ("subjects", "prompts")}

    def run(out, **more):
        editor = editor_class(name).create(task)
        train(task, requests[:14], requests[14:], editor=editor, out=out, **options, **more)
        return load_trained(out)

    whole = run(tmp_path / "whole")
    import os
    import signal

    def stop(progress):
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", on_progress=stop)
    parts = run(tmp_path / "parts", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[key]), key


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "mend"], indirect=True)
def test_training_moves_every_tensor(editor, world, name):
    task, _ = world
    fresh = dict(editor_class(name).create(task).named_parameters())
    for key, value in editor.named_parameters():
        assert not torch.equal(value, fresh[key]), key


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"steps": 0}, {"batch_size": -1}, {"kl_weight": -1.0}])
def test_settings_of_fine_tuning(wrong):
    from remend.editors.finetune import FineTuneConfig
    from remend.errors import ConfigError

    with pytest.raises(ConfigError, match=next(iter(wrong))):
        dataclasses.replace(FineTuneConfig(), **wrong)
