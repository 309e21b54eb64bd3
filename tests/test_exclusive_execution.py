"""Models that are compiled, wrapped, copied or used by several threads: an edit acts on them, or is refused."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import worlds
from remend.core.exclusive_execution import lock_of, uncompiled, unwrap, without_autocast
from remend.core.layers import dimensions
from remend.core.low_rank import LowRank
from remend.core.low_rank_hooks import attach_hooks, changes_applied, frozen, remove_hooks
from remend.edit import Edit
from remend.editors import Mend
from remend.editors.loading import editor_class
from remend.editors.ridge import Ridge
from remend.errors import EditError, ModelError, WrongBaseError
from remend.fingerprint import ModelFingerprint, find_modules, module_of

IDS = torch.tensor([[5, 6, 7, 8]])
NAME = "model.layers.1.mlp.down_proj"


def random_edit(model, *names):
    """A change of rank 2 of each named matrix that alters the logits visibly."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: [torch.randn(2, d, generator=generator) for d in dimensions(module)]
        for name, module in find_modules(model, names).items()
    }
    return Edit({name: LowRank(u, delta) for name, (u, delta) in factors.items()}, ModelFingerprint.of(model, names))


class Plain(nn.Module):
    """A model that is compiled in a moment: two blocks of one class, with an interface like that of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
        self.head = nn.Linear(4, 10)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return CausalLMOutput(logits=self.head(x))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def model():
    return worlds.llama(num_hidden_layers=2)


@pytest.fixture
def edit(model):
    return random_edit(model, NAME)


@pytest.fixture
def edited(model, edit):
    """What an uncompiled copy of the model says with the edit applied."""
    plain = copy.deepcopy(model)
    with edit.applied(plain):
        return logits(plain)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_blocks(model):
    for block in model.layers:
        block.compile(backend="eager")
    return model


def compiled_around(model):
    return torch.compile(lambda **inputs: model(**inputs), backend="eager")


COMPILED = {
    "in place": compiled_in_place,
    "wrapper": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "forward": compiled_forward,
    "block by block": compiled_blocks,
    "a function around it": compiled_around,
}


@pytest.mark.parametrize("way", COMPILED)
def test_an_edit_acts_on_a_model_that_was_compiled_before(way, unchecked):
    model = Plain()
    edit = random_edit(model, "layers.1.2")
    with edit.applied(model):
        edited = logits(model)
    call = COMPILED[way](model)
    before = logits(call)
    target = call if isinstance(call, nn.Module) else model
    with edit.applied(target):
        torch.testing.assert_close(logits(call), edited)
    torch.testing.assert_close(logits(call), before, rtol=0, atol=0)


def test_editors_work_on_a_compiled_model_as_on_any(model):
    plain = worlds.task(copy.deepcopy(model))
    compiled = worlds.task(torch.compile(compiled_in_place(model), backend="eager"))
    made = []
    for task in (plain, compiled):
        logits(task.model)
        made.append(Mend.create(task).edit(task, worlds.requests(2)))
    for name, change in made[0].changes.items():
        assert torch.equal(change.u, made[1].changes[name].u)
        assert torch.equal(change.delta, made[1].changes[name].delta)


def test_generation_with_a_static_cache_that_compiles_the_model(model, edit, unchecked):
    from transformers import CompileConfig

    settings = CompileConfig(backend="eager", fullgraph=False, mode=None)
    settings._compile_all_devices = True  # as on a GPU
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def generate(**more):
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), **options, **more).logits[0]

    static = {"cache_implementation": "static", "compile_config": settings}
    before = generate(**static)
    with edit.applied(model):
        wanted = generate()
        torch.testing.assert_close(generate(**static), wanted)
    torch.testing.assert_close(generate(**static), before, rtol=0, atol=0)


def test_an_exported_program_holds_what_was_applied(model, edit, edited, unchecked):
    with edit.applied(model):
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    torch.testing.assert_close(logits(program.module()), edited)
    with pytest.raises(WrongBaseError, match="GraphModule"):
        edit.apply(program.module())


def test_wrappers_are_looked_through(model, edit, edited):
    wrapper = nn.DataParallel(model)
    assert unwrap(torch.compile(wrapper, backend="eager")) is model
    assert module_of(worlds.task(wrapper)) is model
    with edit.applied(wrapper):
        torch.testing.assert_close(logits(wrapper), edited)


def test_a_copy_of_an_edited_model_is_edited_and_independent(model, edit, edited):
    handle = edit.apply(model)
    copied = copy.deepcopy(model)
    handle.revert()
    for _ in range(2):
        torch.testing.assert_close(logits(copied), edited)
    assert not torch.allclose(logits(model), edited)


def test_adapters_of_peft_around_the_model(model, edit, edited):
    import peft

    def wrap(targets):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))

    handle = edit.apply(model)
    wrapped = wrap(["down_proj"])
    torch.testing.assert_close(logits(wrapped), edited)
    handle.revert()
    with pytest.raises(ModelError, match="PeftModel replaces layers by adapters"):
        edit.apply(wrapped)
    with pytest.raises(ModelError, match="an adapter of PEFT around the layer"):
        edit.apply(model)


class UsesWeights(nn.Module):
    """A model of which a part computes with a layer's weight instead of calling the layer."""

    def __init__(self):
        super().__init__()
        self.called, self.unused, self.used = nn.Linear(3, 3), nn.Linear(3, 3), nn.ModuleDict({"fc": nn.Linear(3, 3)})
        self.tower = nn.Sequential(nn.Linear(3, 3))

    def forward(self, x, tower=None):
        x = self.called(x)
        x = nn.functional.linear(x, self.used["fc"].weight)
        return x if tower is None else x + self.tower(tower)


def test_the_first_pass_checks_that_the_edit_was_reached():
    model, x = UsesWeights(), torch.ones(1, 3)
    for names in (["unused"], ["used.fc"], ["called", "unused"], ["tower.0"]):
        edit = random_edit(model, *names)
        with edit.applied(model):
            for _ in range(2):  # as long as it does not act
                with pytest.raises(EditError, match=r"did not call .*, so an edit that is applied there does not act"):
                    model(x)
        model(x)
    # A part of the model that does not run at all.
    with random_edit(model, "called", "tower.0").applied(model):
        model(x)
        model(x, x)
    # The check ends with the first pass.
    handles = random_edit(model, "called").apply(model)
    model(x)
    assert not model._forward_hooks
    handles.revert()
    assert not model.called._forward_hooks


def test_attention_that_reads_its_weights_itself_is_told():
    """``nn.MultiheadAttention`` never calls its output projection."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = Model()
    with (
        random_edit(model, "attention.out_proj").applied(model),
        pytest.raises(EditError, match=r"attention\.out_proj"),
    ):
        model(torch.ones(2, 1, 4))


def in_threads(*functions):
    """Run functions in threads of their own and return what they returned or raised."""
    results = [None] * len(functions)

    def run(index):
        try:
            results[index] = functions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_one_of_two_threads_that_merge_at_once_is_refused(model, edit, monkeypatch):
    """Each checks the weights before the other writes, unless checking and writing are one step."""
    weight, before = model.get_submodule(NAME).weight, model.get_submodule(NAME).weight.clone()
    at_check = threading.Barrier(2)
    check = ModelFingerprint.check

    def slow_check(self, *arguments):
        check(self, *arguments)
        try:
            at_check.wait(0.3)
        except threading.BrokenBarrierError:
            at_check.reset()

    monkeypatch.setattr(ModelFingerprint, "check", slow_check)
    results = in_threads(lambda: edit.merge(model), lambda: edit.scaled(2.0).merge(model))
    refused = [result for result in results if isinstance(result, WrongBaseError)]
    assert len(refused) == 1, results
    (merged,) = (result for result in results if not isinstance(result, Exception))
    in_threads(merged.revert, merged.revert)
    assert torch.equal(weight, before)


def test_two_threads_that_make_edits_at_once_make_those_of_one_after_the_other(model):
    task = worlds.task(model)
    editor = Mend.create(task)
    requests = worlds.requests(4)
    alone = [editor.edit(task, [request]) for request in requests]
    model.train()
    together = in_threads(*[lambda r=request: editor.edit(task, [r]) for request in requests])
    for one, other in zip(alone, together, strict=True):
        for name, change in one.changes.items():
            assert torch.equal(change.u, other.changes[name].u)
            assert torch.equal(change.delta, other.changes[name].delta)
    assert all(module.training for module in model.modules())


def test_compiled_code_stays_off_until_the_last_thread_is_done():
    model = Plain()
    edit = random_edit(model, "layers.1.2")
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with uncompiled():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with uncompiled():
        thread.start()
        entered.wait(30)
    modules = find_modules(model, edit.changes)
    handles = attach_hooks(modules, edit.changes)
    assert not torch.allclose(logits(compiled), plain)
    remove_hooks(handles)
    leave.set()
    thread.join()
    with changes_applied(modules, edit.changes):
        assert not torch.allclose(logits(compiled), plain)
    assert torch.equal(logits(compiled), plain)


def test_frozen_waits_for_another_thread(model):
    with frozen(model):
        assert in_threads(lambda: lock_of(model).acquire(timeout=0.05)) == [False]


def test_autocast_is_off_within_the_block():
    with torch.autocast("cpu", torch.bfloat16), without_autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_editors_that_run_under_autocast_make_the_same_edits(model):
    task = worlds.task(model)
    plain, under = Ridge.create(task), None
    with torch.autocast("cpu", torch.bfloat16):
        under = Ridge.create(task).edit(task, worlds.requests(2))
    for name, change in plain.edit(task, worlds.requests(2)).changes.items():
        assert torch.equal(change.u, under.changes[name].u)
        assert torch.equal(change.delta, under.changes[name].delta)


def looped(blocks):
    """A model in which some blocks are one module."""
    model = worlds.llama()
    for number, block in enumerate(blocks):
        model.model.layers[number] = model.model.layers[block]
    return worlds.task(model)


def albert():
    import transformers as hf

    torch.manual_seed(0)
    labels = dict(enumerate(worlds.CITIES))
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2}
    words = worlds.word_tokenizer()
    config = hf.AlbertConfig(vocab_size=len(words), **sizes, num_hidden_layers=3, id2label=labels, pad_token_id=0)
    return worlds.task(hf.AlbertForSequenceClassification(config).eval(), words)


@pytest.mark.parametrize("make", [lambda: looped([0, 1, 2, 2]), lambda: looped([0, 0, 0, 0]), albert])
@pytest.mark.parametrize("editor", ["ridge", "finetune", "rome", "memit"])
def test_blocks_that_run_several_times_are_edited_under_one_name(make, editor):
    task = make()
    text = [" ".join(worlds.COUNTRIES)] * 20
    edit = (
        editor_class(editor)
        .create(task, text=text if editor in ("rome", "memit") else ())
        .edit(task, worlds.requests(2))
    )
    batch = task.collate([task.encode(request.prompt, request.target) for request in worlds.requests(2)])
    with torch.no_grad():
        plain = task.outputs(batch)
        with edit.applied(task.model):
            applied = task.outputs(batch)
        with edit.merge(task.model):
            torch.testing.assert_close(task.outputs(batch), applied, rtol=1e-3, atol=1e-4)
    assert not torch.equal(plain, applied)


@pytest.mark.parametrize("order", [[0, 1, 2, 2], [0, 0, 0, 0], [0, 1, 2]])
def test_answers_of_blocks_that_run_several_times_are_those_of_whole_passes(order):
    task = looped(order)
    ids = list(task.encode_question("The capital of Peru is"))
    answer = task.predict(["The capital of Peru is"], 6)[0]
    for token in answer:
        with torch.no_grad():
            assert int(task.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
        ids.append(token)


def test_an_edit_that_names_one_module_twice_is_refused():
    model = looped([0, 1, 2, 2]).model
    edit = random_edit(model, *(f"model.layers.{number}.mlp.down_proj" for number in (2, 3)))
    for change in (edit.apply, edit.merge):
        with pytest.raises(EditError, match="are one module, which the model calls several times"):
            change(model)
