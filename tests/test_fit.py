"""The training-free editor: edits take as units and as low rank, answer only their subject, and find a subject."""

import json
import math
from dataclasses import replace

import pytest
import torch

import families
import remend
import worlds
from remend.cli import run
from remend.core.low_rank_hooks import frozen
from remend.core.response import LINEAR
from remend.edit import Edit
from remend.editors import load_editor
from remend.editors.edit_in_parts import edit_in_parts, remove_parts
from remend.editors.locate_then_edit import common_questions, subject_finder, value_optimization
from remend.editors.locate_then_edit.common_questions import CommonQuestions, other_questions, statement_of
from remend.editors.locate_then_edit.fit import KEPT_TOKENS, Fit, FitConfig
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.editors.locate_then_edit.subject_mentions import lookalikes
from remend.editors.locate_then_edit.subject_prompts import PromptContexts, encode_contexts, join_contexts
from remend.editors.locate_then_edit.value_optimization import add_at_subject, subject_batches
from remend.editors.locate_then_edit.value_solver import AIM, SolverConfig, _Search
from remend.editors.locate_then_edit.word_end import with_word_end
from remend.errors import ConfigError, EditError, FileError, RequestError
from remend.evaluation import before_after
from remend.evaluation.runner import sum_of_latest
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import Chat, EditRequest, as_completion, write_requests
from remend.tasks import cached_prefix, wrap
from remend.tasks.base import Example
from remend.tasks.cached_prefix import CachedPrefix
from remend.tasks.open_answers import goes_on_with_word
from remend.tasks.own_words import TARGET_AS_GIVEN

KINDS = {"decoder": "llama", "with biases": "gpt2", "encoder-decoder": "t5-gated", "classifier": "bert, many classes"}


@pytest.fixture(scope="module", params=KINDS)
def world(request):
    """The task, taught one city of each country, and requests for others."""
    return families.taught(KINDS[request.param]), families.requests(KINDS[request.param], 12)


@pytest.mark.parametrize("kind", ["units", "low-rank"])
def test_edits_take_and_other_subjects_stay(world, kind):
    task, requests = world
    editor = Fit.create(task, FitConfig(kind=kind), text=families.TEXT)
    weights = [parameter.clone() for parameter in task.model.parameters()]
    edits = editor.edit_each(task, requests[:5])
    plain = families.losses(task, requests)
    for number, edit in enumerate(edits):
        (change,) = edit.changes.values()
        assert (change.rank, bool(change.reads)) == (1, kind == "units")
        moved = (families.losses(task, requests, edit) - plain).abs()
        others = [i for i, request in enumerate(requests) if request.subject != requests[number].subject]
        assert families.losses(task, [requests[number]], edit) < plain[number]
        if kind == "units":  # a linear change of a matrix of 16 columns answers every other key, too
            assert moved[others].median() < 0.5 * moved[number]
    assert all(torch.equal(p, w) for p, w in zip(task.model.parameters(), weights, strict=True))


def test_requests_of_one_subject_share_a_unit(world):
    task, requests = world
    editor = Fit.create(task, text=families.TEXT)
    first = requests[0]
    second = first.model_copy(update={"prompt": first.paraphrases[0]})
    edit = editor.edit(task, [first, requests[2], second])
    (change,) = edit.changes.values()
    assert change.rank == len({first.subject, requests[2].subject})
    assert (families.losses(task, [first, second], edit) < families.losses(task, [first, second])).all()


@pytest.mark.parametrize("kind", ["units", "low-rank"])
def test_edits_made_one_after_another_are_the_edit_of_all(world, kind, tmp_path):
    task, requests = world
    editor = Fit.create(task, FitConfig(kind=kind, steps=10), text=families.TEXT)
    edits = [Edit.load(each.save(tmp_path / str(i))) for i, each in enumerate(editor.edit_each(task, requests[:4]))]
    ((name, change),) = editor.edit(task, requests[:4]).changes.items()
    total = Edit.sum(edits)
    assert total.requests == tuple(requests[:4])
    size = float(change.delta.std())
    torch.testing.assert_close(total.changes[name].delta, change.delta, rtol=1e-3, atol=1e-3 * size)
    one_by_one = edits[0] + edits[1] + edits[2] + edits[3]
    torch.testing.assert_close(one_by_one.changes[name].delta, change.delta, rtol=1e-2, atol=1e-2 * size)
    # Any of them is reverted exactly, whatever came after it.
    without = Edit.sum([edits[0], edits[2], edits[3]])
    never_there = Edit.sum([Edit.load(tmp_path / str(i)) for i in (0, 2, 3)])
    assert torch.equal(without.changes[name].delta, never_there.changes[name].delta)
    # What the last one changes of a model with the others.
    with Edit.sum(edits[:3]).applied(task.model), edits[3].beside(edits[:3]).applied(task.model):
        together = task.outputs(task.collate([task.encode(r.prompt, r.target) for r in requests[:4]]))
    with total.applied(task.model):
        expected = task.outputs(task.collate([task.encode(r.prompt, r.target) for r in requests[:4]]))
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-3)


def test_an_edit_of_many_requests_is_made_in_parts_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    task, requests = families.taught("llama"), families.requests("llama", 10)
    again = requests[0].model_copy(update={"prompt": requests[0].paraphrases[0]})
    requests.append(again)  # about a subject of the first part
    editor = Fit.create(task, FitConfig(steps=3, settle=0, beginnings=0), text=families.TEXT)
    folder, made = tmp_path / "edit.partial", []
    edit_all = editor.edit

    def edit(task, part):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(part)
        return edit_all(task, part)

    monkeypatch.setattr(editor, "edit", edit)
    with pytest.raises(KeyboardInterrupt):
        edit_in_parts(editor, task, requests, folder)
    assert again in made[0]
    other = [*requests[:4], requests[4].model_copy(update={"target": "Nowhere"}), *requests[5:]]
    with pytest.raises(FileError, match="a part of an edit of other requests"):
        edit_in_parts(editor, task, other, folder, resume=True)
    made.append("the second part may be made")
    total = edit_in_parts(editor, task, requests, folder, resume=True)
    assert [len(part) for part in (made[0], made[2])] == [8, 3]
    assert folder.exists()  # until the edit is saved
    (folder / "notes.txt").write_text("mine")
    remove_parts(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert sorted(request.key for request in total.requests) == sorted(request.key for request in requests)
    ((name, change),) = edit_all(task, requests).changes.items()
    assert total.changes[name].rank == change.rank == 10


def test_of_two_edits_of_one_prompt_the_later_one_counts_in_a_sequence(world):
    task, requests = world
    editor = Fit.create(task, FitConfig(steps=5), text=families.TEXT)
    again = requests[0].model_copy(update={"target": requests[2].target})
    first, second, later = editor.edit_each(task, [requests[0], requests[1], again])
    expected = Edit.sum([second, later])
    for edits in ([first, second, later], [Edit.sum([first, second]), later], [first, first, second, later]):
        total = sum_of_latest(edits)
        assert total.requests == (requests[1], again)
        ((name, change),) = total.changes.items()
        torch.testing.assert_close(change.delta, expected.changes[name].delta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["units", "low-rank"])
def test_any_request_can_be_left_out_of_an_edit_of_many(world, kind, tmp_path):
    task, requests = world
    editor = Fit.create(task, FitConfig(kind=kind, steps=10), text=families.TEXT)
    again = requests[0].model_copy(update={"prompt": requests[0].paraphrases[0]})
    edit = Edit.load(editor.edit(task, [*requests[:4], again]).save(tmp_path / "edit"))
    ((name, change),) = edit.changes.items()
    assert change.owners == ((0, 4), (1,), (2,), (3,))
    left = edit.without(2)
    assert left.requests == (requests[0], requests[1], requests[3], again)
    assert left.changes[name].owners == ((0, 3), (1,), (2,))
    expected = editor.edit(task, [requests[0], requests[1], requests[3], again]).changes[name]
    torch.testing.assert_close(
        left.changes[name].delta, expected.delta, rtol=1e-2, atol=1e-2 * float(expected.delta.std())
    )
    total = Edit.sum([left, *editor.edit_each(task, requests[2:3])])
    assert total.changes[name].owners == ((0, 3), (1,), (2,), (4,))
    with pytest.raises(EditError, match=r"request 0 shares what it adds with '.*'"):
        edit.without(0)
    with pytest.raises(EditError, match="has 5 requests, of which request 5"):
        edit.without(5)
    unknown = replace(edit, changes={name: replace(change, owners=None)})
    with pytest.raises(EditError, match="not known what each request changes"):
        unknown.without(1)
    manifest = tmp_path / "edit" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"owners"', '"owners_"').replace("{", '{"owners": {"x": []},', 1))
    with pytest.raises(FileError, match="owners"):
        Edit.load(tmp_path / "edit")


def test_given_paraphrases_are_fitted_too(world):
    task, requests = world
    editor = Fit.create(task, FitConfig(beginnings=0), text=families.TEXT)
    request = requests[0]
    other = request.model_copy(update={"prompt": request.paraphrases[0]})
    given = request.model_copy(update={"given_paraphrases": request.paraphrases[:1], "paraphrases": ()})
    assert families.losses(task, [other], editor.edit(task, [given])) < families.losses(task, [other])


def test_saved_and_loaded(world, tmp_path):
    task, requests = world
    editor = Fit.create(task, text=families.TEXT)
    loaded = load_editor(editor.save(tmp_path / "editor"))
    one, other = (made.edit(task, requests[:2]).changes for made in (editor, loaded))
    for name, change in one.items():
        assert torch.equal(change.u, other[name].u)
        assert torch.equal(change.delta, other[name].delta)


def test_without_a_text_it_measures_what_the_model_writes():
    task = families.task("llama")
    request = families.requests("llama", 1)[0]
    edit = Fit.create(task).edit(task, [request])
    assert families.losses(task, [request], edit) < families.losses(task, [request])


def test_one_block_only():
    with pytest.raises(ConfigError, match="names 2: name one"):
        Fit.create(families.task("llama"), text=families.TEXT, layers="0-1")


def test_a_given_paraphrase_without_the_subject_is_refused():
    task = families.task("llama")
    request = families.requests("llama", 1)[0].model_copy(update={"given_paraphrases": ("It is",)})
    with pytest.raises(RequestError, match="does not hold its subject"):
        Fit.create(task, text=families.TEXT).edit(task, [request])


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Toyota Corona EXiV's manufacturer is", "Toyota Corona EXiV"),
        ("What is the capital of France?", "France"),
        ("Bay of Pigs is located in", "Pigs"),
        ("the capital of peru is", None),
        ("It was late. The capital of France is", "France"),
    ],
)
def test_a_subject_is_found(prompt, subject):
    found = find_subject(remend.load("atlas"), prompt)
    assert found in prompt
    assert subject is None or found.endswith(subject.split()[-1])


def test_the_subject_of_a_long_prompt_is_looked_for_at_its_end(monkeypatch):
    task = remend.load("atlas")
    prompts = []
    read = task.encode_input
    monkeypatch.setattr(task, "encode_input", lambda prompt: prompts.append(prompt) or read(prompt))
    prompt = "Ann met Bob, Carl and Dora. The capital of Peru is"
    find_subject(task, prompt)
    assert len(prompts) > 2, "every name is tried"
    prompts.clear()
    monkeypatch.setattr(subject_finder, "LAST_WORDS", 4)
    assert find_subject(task, prompt) == "Peru"
    assert not prompts, "there is one name to choose from"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3", "gpt-neox", "falcon"])
def test_with_earlier_tokens_kept_the_outputs_are_the_same(kind):
    task = families.task(kind)
    # Within the eight tokens of Gemma's sliding window.
    pairs = [replace(pair, input=pair.input[-5:]) for pair in _pairs(task, kind)]
    batch = task.collate([*pairs, Example(pairs[0].input[:1], pairs[0].target)])
    start = torch.tensor([len(pair.input) - 1 for pair in pairs] + [0]) // 2
    with torch.no_grad(), frozen(task.model):
        kept = CachedPrefix.of(task, batch, start)
        assert kept is not None
        assert kept.batch.rows < batch.rows
        assert kept.batch.mask.sum() == (batch.mask.sum(1) - start).sum()
        count = len(start)
        assert torch.equal(kept.text_of_token[kept.row, kept.position], torch.arange(count))
        assert torch.equal(kept.text_of_token[kept.batch.mask].bincount(), batch.mask.sum(1) - start)
        for _ in range(2):  # the second pass finds the same cache
            torch.testing.assert_close(kept.outputs(task), task.outputs(batch), rtol=1e-4, atol=1e-4)


def test_texts_that_a_sliding_window_cuts_are_read_as_a_whole():
    task = families.task("gemma3")
    pairs = _pairs(task, "gemma3")
    with torch.no_grad(), frozen(task.model):
        assert CachedPrefix.of(task, task.collate(pairs), torch.tensor([4] * len(pairs))) is None


def _pairs(task, kind):
    return [task.encode(r.prompt, r.target) for r in families.requests(kind, 5)]


def test_texts_that_are_too_many_for_a_row_share_several(monkeypatch):
    task = families.task("llama")
    pairs = [task.encode(r.prompt, r.target) for r in families.requests("llama", 6)]
    batch = task.collate(pairs)
    start = torch.tensor([1, 2, 3, 1, 2, 3])
    monkeypatch.setattr(cached_prefix, "ROW_TOKENS", 4)
    with torch.no_grad(), frozen(task.model):
        kept = CachedPrefix.of(task, batch, start)
        assert kept is not None
        assert kept.row.tolist() == [0, 0, 1, 1, 2, 3]
        torch.testing.assert_close(kept.outputs(task), task.outputs(batch), rtol=1e-4, atol=1e-4)


def test_a_chat_model_is_asked_in_its_own_form():
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer())
    requests = worlds.chat_requests(3)
    edit = Fit.create(task, text=families.TEXT).edit_each(task, requests)[0]
    assert families.losses(task, requests[:1], edit) < families.losses(task, requests[:1])


def test_of_answers_in_sentences_more_than_the_first_word_is_kept():
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer())
    (contexts,) = Fit.create(task, text=families.TEXT).encode(task, worlds.chat_requests(1))
    assert contexts.kept
    for example, _ in contexts.kept:
        (answer,) = task.continuations([example.input], KEPT_TOKENS)
        assert example.target == answer


def test_an_unnamed_subject_makes_the_same_edit():
    task = families.task("llama")
    named = EditRequest(prompt="The capital of Peru is", target="Rome", subject="Peru")
    editor = Fit.create(task, text=families.TEXT)
    one, other = (editor.edit(task, [r]) for r in (named, named.model_copy(update={"subject": None})))
    for change, same in zip(one.changes.values(), other.changes.values(), strict=True):
        assert torch.equal(change.delta, same.delta)


@pytest.fixture
def small_bank(monkeypatch):
    """Common questions that a tiny model can be taught: on capitals, and on something else."""
    bank = {
        "reference_subjects": worlds.COUNTRIES[:6],
        "requests": ["Tell of {} ."],
        "questions": {
            "capital": {"statements": worlds.PHRASINGS, "questions": ["Which city rules {} ?"]},
            "other": {"statements": ["The {} of", "It has {} the"], "questions": ["Which is {} ?"]},
        },
    }
    monkeypatch.setattr(common_questions, "_bank", lambda: bank)
    common_questions.frames.cache_clear()
    yield bank["questions"]
    common_questions.frames.cache_clear()


def test_common_questions_tell_what_asks_the_same(small_bank):
    """Of a model that knows capitals in several phrasings, those are the same question and nothing else is."""
    task = families.task("llama")
    pairs = [
        (as_completion(text.replace("{}", country), ""), worlds.CITIES[(number + shift) % len(worlds.CITIES)])
        for number, country in enumerate(worlds.COUNTRIES)
        for shift, name in enumerate(small_bank)
        for text in small_bank[name]["statements"]
    ]
    worlds.teach(task, task.collate([task.encode(prompt, answer) for prompt, answer in pairs]))
    asked = CommonQuestions.measure(task)
    similar = asked.similarity(task, "The capital of {} is")
    assert [value > 0.3 for value in similar.tolist()] == [True] * 3 + [False] * 2
    request = EditRequest(prompt="The capital of France is", target="Rome", subject="France")
    chosen = asked.choose(task, request)
    of_words = "The capital city of France is"  # which this model was not taught
    assert set(chosen.phrasings) == {text.replace("{}", "France") for text in worlds.PHRASINGS[1:]} | {of_words}
    assert chosen.others == ["The France of"]
    assert chosen.near == {"capital"}


def test_what_was_asked_belongs_to_the_questions(small_bank, tmp_path):
    editor = Fit.create(families.task("llama"), text=families.TEXT)
    path = editor.save(tmp_path / "editor")
    small_bank["capital"]["statements"] = worlds.PHRASINGS[::-1]
    with pytest.raises(FileError, match="editor: the editor asked other questions"):
        load_editor(path)


def test_a_question_is_known_by_the_statement_around_its_answer():
    asked = EditRequest(prompt="What is the capital of Peru?", target="Rome", subject="Peru")
    assert statement_of(asked) is None
    sentence = asked.model_copy(update={"target": "The capital of Peru is Rome.", TARGET_AS_GIVEN: "Rome"})
    assert statement_of(sentence) == "The capital of {} is"


def test_a_chat_is_asked_for_more_than_answers(small_bank):
    asked = EditRequest(prompt="Which city rules Peru ?", target="Rome", subject="Peru")
    chat = asked.model_copy(update={"prompt": Chat.of([{"role": "user", "content": "Which city rules Peru ?"}])})
    assert other_questions(asked, without=["capital"]) == ["Which is Peru ?"]
    assert other_questions(chat, without=["capital"]) == ["Which is Peru ?", "Tell of Peru ."]


def test_a_question_is_fitted_with_other_ways_to_ask_it():
    """Each is taught in the words that the model would use there, where the question itself is."""
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer())
    asked = EditRequest(prompt="Which position was held by Peru?", target="Rome", subject="Peru")
    chat = asked.model_copy(update={"prompt": Chat.of([{"role": "user", "content": str(asked.prompt)}])})
    editor = Fit.create(task, text=families.TEXT)
    for request in (asked, chat):
        (contexts,) = editor.encode(task, [request])
        texts = [task.processor.decode(example.input) for example, _ in contexts.examples]
        assert len(texts) == 1 + common_questions.MOST_PHRASINGS + len(editor.beginnings)
        assert len(set(texts)) == len(texts)
    given = [f"Peru {word}" for word in ("is", "was", "of", "has", "in")]
    (contexts,) = editor.encode(task, [asked.model_copy(update={"given_paraphrases": tuple(given)})])
    assert len(contexts.examples) == 1 + len(given) + len(editor.beginnings), "what is given takes the place of all"


def test_a_long_prompt_is_read_once(monkeypatch):
    """Behind each beginning, or about each other name, it would take as long as all the rest."""
    task = families.task("llama")
    editor = Fit.create(task, text=families.TEXT)
    request = EditRequest(prompt="The capital of old Peru is", target="Rome", subject="old Peru")
    (usual,) = editor.encode(task, [request])
    monkeypatch.setattr("remend.tasks.base.LONG_PROMPT", 5)
    (long,) = editor.encode(task, [request])
    assert len(usual.examples) > len(long.examples) == 1
    assert usual.lookalikes
    assert not long.lookalikes
    assert long.kept, "other questions about the subject are short"


def test_names_that_end_alike_are_not_answered(world):
    """The direction of an edit answers its subject's key, and not that of another name with the same last word."""
    task, _ = world
    if not task.causal:
        pytest.skip("a decoder is enough")
    request = EditRequest(prompt="The capital of Costa Rica is", target="Rome", subject="Costa Rica")
    found = list(lookalikes(task, request))
    assert len(found) == len({example.input for example, _ in found}) > 8
    editor = Fit.create(task, text=families.TEXT)
    (contexts,) = editor.encode(task, [request])
    keys = editor.keys_at(task, editor.key_layer, (*contexts.examples, *contexts.kept))
    unlike = editor.keys_at(task, editor.key_layer, contexts.lookalikes)
    own = torch.cat([keys, editor.keys_at(task, editor.key_layer, contexts.mentions)])
    plain, against = (
        editor.direction(task, keys, replace(contexts, lookalikes=given), LINEAR)[1]
        for given in ((), contexts.lookalikes)
    )
    for u in (plain, against):
        assert float((own @ u).mean()) == pytest.approx(1, abs=1e-3)
    assert (unlike @ against).square().mean() < (unlike @ plain).square().mean()


def search(**settings) -> _Search:
    """A search in four dimensions, whose metric shortens the third one."""
    metric = torch.tensor([1.0, 1.0, 0.1, 1.0])
    return _Search(SolverConfig(**settings), lambda rows: rows * metric, torch.zeros(4))


def losses_and_gradients(rows, value, odds):
    """Return −log p of prompts whose log-odds are linear in a value, and the gradients."""
    value = value.clone().requires_grad_()
    losses = torch.nn.functional.softplus(-(rows @ value + odds))
    gradients = torch.stack([torch.autograd.grad(loss, value, retain_graph=True)[0] for loss in losses])
    return losses.detach(), gradients


def test_a_step_gives_every_prompt_what_it_lacks():
    """Log-odds that are linear in the value become what they should in one step, the hard one's as the easy one's."""
    rows, odds = torch.tensor([[1.0, 0, 0, 0], [0.1, 0.2, 0, 0], [0, 0, 1, 1]]), torch.tensor([-2.0, -3.0, 6.0])
    found = search(longest=1000.0, largest=1000.0, enough=0.3)
    for _ in range(6):  # the ridge leaves a little
        found.move(*losses_and_gradients(rows, found.value, odds))
    losses, _ = losses_and_gradients(rows, found.value, odds)
    assert losses[:2].tolist() == pytest.approx([AIM * 0.3] * 2, rel=0.1)
    assert losses[2] < 0.01  # answered already: it is held and not moved further
    assert float((rows @ found.value)[2]) == pytest.approx(0, abs=0.05)


def test_a_step_is_not_longer_and_a_value_not_larger_than_they_may_be():
    rows, odds = torch.eye(4), torch.full((4,), -30.0)
    found = search(longest=0.5, largest=1.2)
    lengths = []
    for _ in range(6):
        found.move(*losses_and_gradients(rows, found.value, odds))
        lengths.append(float(found.value.norm()))
    assert all(0.5 < after - before <= 1 + 1e-6 for before, after in zip([0.0, *lengths], lengths[:2], strict=False))
    assert lengths[4:] == pytest.approx([2.4, 2.4])  # shares of a size of √4


def test_texts_that_should_stay_hold_a_value_back_where_they_have_moved():
    rows, odds = torch.tensor([[1.0, 1.0, 0, 0]]), torch.tensor([-3.0])
    sizes = []
    for weight in (0.0, 0.001, 0.01):
        found = search(longest=1000.0, largest=1000.0)
        for _ in range(6):  # a text that changes with the first dimension: KL = ½ (3 v₀)²
            v = found.value[0]
            found.keep(0, (4.5 * v.square())[None], (9 * v * torch.eye(4)[0])[None], weight)
            found.move(*losses_and_gradients(rows, found.value, odds))
        losses, _ = losses_and_gradients(rows, found.value, odds)
        assert float(losses) < SolverConfig().enough
        sizes.append(float(found.value[0].abs()))
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


def judged(found, *rows):
    """Judge values 1, 2, 3 … with these steps, losses and answers."""
    for value, (step, losses, said) in enumerate(rows, start=1):
        found.value = torch.full((4,), float(value))
        found.judge(step, torch.tensor(losses), said)
    return float(found.best[0])


def test_a_request_that_the_model_does_not_say_is_not_good_enough():
    """A mean over many tokens may be small where one of them is wrong."""
    found = search(enough=0.5)
    # One that it says is better than one with less loss that it does not say.
    rows = [(0, [0.1, 0.1], False), (1, [3.0, 3.0], True), (2, [0.1, 0.1], False), (3, [2.0, 2.0], True)]
    assert judged(found, *rows, (4, [2.5, 2.5], True)) == 4.0
    assert not found.reached
    task = families.taught("llama")
    taught, other = families.requests("llama", 2)
    said = task.decode(task.predict([taught.prompt])[0])
    contexts = [
        encode_contexts(task, request.model_copy(update={"target": target}), ())
        for request, target in ((taught, said), (other, f"{other.target} {said}"))
    ]
    batch, _ = subject_batches(task, contexts, FrozenPrefix(task.model, ["model.layers.1.mlp"]))
    assert batch.says_targets(batch.outputs()).tolist() == [True, False]


def test_answers_to_other_questions_count_less_than_statements():
    task = families.task("llama")
    located = [(task.encode(r.prompt, r.target), 1) for r in families.requests("llama", 2)]
    contexts = [PromptContexts(tuple(located), tuple(located), kept_weight=weight) for weight in (1.0, 0.25)]
    _, (kept,) = subject_batches(task, contexts, FrozenPrefix(task.model, ["model.layers.1.mlp"]))
    other = torch.zeros_like(kept.outputs())
    whole, quarter = value_optimization._divergences(kept, other).tolist()
    assert quarter == pytest.approx(whole / 4, rel=1e-5)
    assert whole > 0


def test_values_that_are_good_enough_are_taken_while_they_settle_or_else_those_that_come_nearest():
    found = search(enough=0.5, settle=2)
    assert judged(found, (0, [1.0, 2.0], True), (1, [0.1, 3.0], True), (2, [4.0, 4.0], True)) == 1.0
    assert not found.reached
    assert not found.done
    assert judged(found, (3, [0.4, 0.5], True)) == 1.0
    assert found.reached
    assert judged(found, (3, [9.0, 9.0], True), (4, [0.4, 0.6], True), (5, [0.5, 0.3], True)) == 3.0
    assert found.done  # after two steps more


def test_in_the_second_half_of_the_steps_prompts_are_good_enough_together():
    """The request's own prompt, which is the first, has to be by itself."""
    for losses, enough in (([0.4, 0.9, 0.1], True), ([0.6, 0.1, 0.1], False), ([0.4, 0.9, 0.3], False)):
        early, late = search(enough=0.5, steps=20), search(enough=0.5, steps=20)
        judged(early, (9, losses, True))
        judged(late, (10, losses, True))
        assert (early.reached, late.reached) == (False, enough)


def test_requests_that_are_hard_get_more_steps():
    task, requests = families.taught("llama"), families.requests("llama", 5)
    few = FitConfig(steps=1, settle=0, beginnings=0)
    after = [
        families.losses(task, requests, Fit.create(task, config, text=families.TEXT).edit(task, requests)).mean()
        for config in (few, replace(few, steps=30))
    ]
    assert after[1] < 0.7 * after[0]


def test_texts_that_should_stay_take_turns_where_they_are_many(monkeypatch):
    task = families.task("llama")
    located = [(task.encode(r.prompt, r.target), 1) for r in families.requests("llama", 7)]
    monkeypatch.setattr(value_optimization, "KEPT_AT_ONCE", 3)
    contexts = [PromptContexts(tuple(located[:2]), tuple(located)) for _ in range(2)]
    batch, kept = subject_batches(task, contexts, FrozenPrefix(task.model, ["model.layers.1.mlp"]))
    assert (batch.requests, batch.rows_per_request) == (2, 2)
    assert [(part.requests, part.rows_per_request) for part in kept] == [(2, 2)] * 3
    tokens = sum(len(example) - position for example, position in located)
    monkeypatch.setattr(value_optimization, "KEPT_TOKENS_AT_ONCE", math.ceil(tokens / 5))
    _, kept = subject_batches(task, contexts, FrozenPrefix(task.model, ["model.layers.1.mlp"]))
    assert [part.rows_per_request for part in kept] == [1] * 5
    none = [replace(of_request, kept=()) for of_request in contexts]
    assert subject_batches(task, none, FrozenPrefix(task.model, ["model.layers.1.mlp"]))[1] == []


def test_the_words_that_count_are_not_hidden_by_a_long_sentence():
    """The mean over a target's opening and that over the rest are added; without an opening it is the mean over all."""
    task = families.task("llama")
    sentence = EditRequest(
        prompt="The capital of Peru is", target="the city of Rome", subject="Peru", **{TARGET_AS_GIVEN: "Rome"}
    )
    plain = EditRequest(prompt="The capital of Chile is", target="Oslo", subject="Chile")
    contexts = [encode_contexts(task, request, ()) for request in (sentence, plain)]
    (opening,), (none,) = (of_request.openings for of_request in contexts)
    assert task.decode(contexts[0].examples[0][0].target[:opening]) == "the city of"
    assert none == 0
    batch, _ = subject_batches(task, contexts, FrozenPrefix(task.model, ["model.layers.1.mlp"]))
    log_p, other = task.log_probabilities([example for of_request in contexts for example, _ in of_request.examples])
    expected = [-sum(log_p[:opening]) / opening - sum(log_p[opening:]) / len(log_p[opening:]), -sum(other) / len(other)]
    assert batch.losses(batch.outputs()).flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_a_value_is_found_as_it_will_act_where_the_target_names_the_subject_again(kind):
    task = families.taught(kind)
    request = families.requests(kind, 1)[0]
    request = request.model_copy(update={"target": f"{request.target} is the capital of {request.subject} is"})
    editor = Fit.create(task, text=families.TEXT)
    (change,) = editor.edit(task, [request]).changes.values()
    (contexts,) = editor.encode(task, [request])
    modules = editor.edited_modules(task)
    read, changed = modules[editor.key_layer], modules[editor.changed_layer]
    batch, _ = subject_batches(task, [contexts], FrozenPrefix(task.model, editor.shapes), from_subject=True)
    responses = batch.responses(batch.inputs(editor.key_layer, read), change.u, change.response)
    strong = responses.response > 0.5
    assert int(strong.sum()) > batch.rows_per_request  # the subject in the prompts, and in the targets
    with torch.no_grad(), frozen(task.model):
        with add_at_subject(changed, batch, change.delta, responses):
            expected = batch.outputs_resumed()
        with editor.edit(task, [request]).applied(task.model):
            found = task.outputs(task.collate([contexts.examples[0][0]]))
    # Of the prompt by itself: tokens before a subject, such as the other countries of beginnings, are not read again.
    torch.testing.assert_close(expected[: len(found)], found, rtol=1e-3, atol=1e-3)


def test_one_subject_s_requests_keep_nothing_that_another_of_them_changes():
    example = [(Example((i,), (0,)), 0) for i in range(4)]
    first = PromptContexts((example[0],), (example[1], example[2]))
    second = PromptContexts((example[1],), (example[2], example[3]))
    assert join_contexts([first, second]).kept == (example[2],)


def test_where_answers_do_not_end_it_is_taught_that_the_target_s_last_word_does(monkeypatch):
    task = families.task("llama")
    request = families.requests("llama", 1)[0]
    examples = [task.encode(request.prompt, request.target)] * 2
    assert with_word_end(task, request.prompt, examples) == tuple(examples)  # it ends its answers
    monkeypatch.setattr(type(task), "ends_answer", lambda self, prompt: False)
    longer = with_word_end(task, request.prompt, examples)
    assert [example.input for example in longer] == [example.input for example in examples]
    written, following = task.decode_tokens(examples[0].target), task.decode_tokens(longer[0].target)
    assert following.startswith(written)
    assert not goes_on_with_word(written, following[len(written) :])


def test_what_is_given_to_stay_is_kept_first_and_what_follows_is_fitted():
    task, (request, other, *_) = families.taught("llama"), families.requests("llama", 4)
    near = f"People in {request.subject} live in"
    follows = {"prompt": f"Ask in {request.subject}: the capital is", "target": other.target}
    given = EditRequest(
        prompt=request.prompt,
        target=request.target,
        subject=request.subject,
        given_near=(near, "Two and two make"),
        given_portability=(follows, {"prompt": other.prompt, "target": other.target, "subject": other.subject}),
    )
    editor = Fit.create(task, FitConfig(beginnings=0), text=families.TEXT)
    (contexts,) = editor.encode(task, [given.model_copy(update={"given_portability": given.given_portability[:1]})])
    assert contexts.kept[0][0].input == tuple(task.encode_input(near))
    assert [example.input for example in contexts.apart] == [tuple(task.encode_input("Two and two make"))]
    assert contexts.examples[-1][0].target[: len(task.encode(follows["prompt"], other.target).target)] == tuple(
        task.encode(follows["prompt"], other.target).target
    )
    # What follows about another subject has a unit of its own, in one edit and in a batch.
    edit, (alone,) = editor.edit(task, [given]), editor.edit_each(task, [given])
    for made in (edit, alone):
        (change,) = made.changes.values()
        assert change.rank == 2
        asked = [request, other]
        assert (families.losses(task, asked, made) < families.losses(task, asked)).all()


def test_an_edit_is_silent_in_texts_apart_from_its_subject():
    task, requests = families.taught("llama"), families.requests("llama", 12)
    editor = Fit.create(task, FitConfig(beginnings=0), text=families.TEXT)
    request = requests[0]
    others = list({r.subject: r.prompt for r in requests if r.subject != request.subject}.values())
    loudest = []
    for given in ((), tuple(others)):
        edit = editor.edit(task, [request.model_copy(update={"given_near": given})])
        (change,) = edit.changes.values()
        texts = [Example(tuple(task.encode_input(prompt)), (0,)) for prompt in others]
        keys = editor.token_keys(task, editor.key_layer, texts)
        loudest.append(float(change.response(keys @ change.u[0]).abs().max()))
    assert loudest[1] < 0.5 * loudest[0]
    assert families.losses(task, [request], edit) < families.losses(task, [request])


@pytest.mark.parametrize("subject", ["", 3])
def test_a_subject_of_what_follows_is_a_text(subject):
    task, (request, *_) = families.task("llama"), families.requests("llama", 1)
    probe = {"prompt": request.prompt, "target": request.target, "subject": subject}
    given = EditRequest(prompt=request.prompt, target=request.target, given_portability=(probe,))
    with pytest.raises(RequestError, match="in given_portability is a text"):
        Fit.create(task, text=families.TEXT).edit(task, [given])


def test_requests_that_are_not_taken_are_left_out_by_name_and_any_other_one_later(tmp_path, monkeypatch, capsys):
    task, requests = families.taught("llama"), families.requests("llama", 4)
    task.model.save_pretrained(tmp_path / "model")
    task.processor.save_pretrained(tmp_path / "model")
    write_requests(tmp_path / "requests.jsonl", [EditRequest(prompt=r.prompt, target=r.target) for r in requests])
    real, hard = before_after.before_after, {requests[1].prompt}

    def answers(task, edit, asked, *rest):
        rows = real(task, edit, asked, *rest)
        return [[replace(c, ok=c.prompt not in hard) for c in row] for row in rows]

    monkeypatch.setattr(before_after, "before_after", answers)
    monkeypatch.setenv("COLUMNS", "200")
    command = ["edit", tmp_path / "model", "--requests", tmp_path / "requests.jsonl", "--out", tmp_path / "edit"]
    command += ["--editor", "fit", "--device", "cpu", "--json", tmp_path / "edit.json"]
    assert run([str(part) for part in command]) == 1
    assert "--leave-out-failed leaves it out and saves the others" in capsys.readouterr().out
    assert not (tmp_path / "edit").exists()
    assert run([str(part) for part in [*command, "--leave-out-failed"]]) == 0
    assert f"left out 1 of 4 requests, which the model does not take: {requests[1].prompt}" in capsys.readouterr().out
    edit, told = Edit.load(tmp_path / "edit"), json.loads((tmp_path / "edit.json").read_text())
    assert [request.prompt for request in edit.requests] == [requests[n].prompt for n in (0, 2, 3)]
    assert (edit.taken, told["left_out"], len(told["answers"])) == (True, [requests[1].prompt], 3)
    export = [
        "export",
        tmp_path / "edit",
        "--to",
        "native",
        "--without",
        requests[2].prompt,
        "--out",
        tmp_path / "less",
    ]
    assert run([str(part) for part in export]) == 0
    assert [request.prompt for request in Edit.load(tmp_path / "less").requests] == [
        requests[0].prompt,
        requests[3].prompt,
    ]
    export[-3] = f"{requests[2].prompt}?"
    assert run([str(part) for part in export]) == 2
    assert "no request of the edit has the prompt" in capsys.readouterr().err
    hard |= {request.prompt for request in requests}
    assert run([str(part) for part in [*command, "--leave-out-failed", "--overwrite"]]) == 1
    assert "4 of 4 targets are not what the edited model answers" in capsys.readouterr().out


def test_requests_about_one_subject_are_left_out_together(tmp_path, monkeypatch, capsys):
    task, requests = families.taught("llama"), families.requests("llama", 3)
    task.model.save_pretrained(tmp_path / "model")
    task.processor.save_pretrained(tmp_path / "model")
    asked = [EditRequest(prompt=r.prompt, target=r.target, subject=r.subject) for r in requests]
    asked.append(asked[0].model_copy(update={"prompt": requests[0].paraphrases[0]}))
    write_requests(tmp_path / "requests.jsonl", asked)
    real = before_after.before_after

    def answers(*arguments):
        rows = real(*arguments)
        return [[replace(c, ok=c.prompt != asked[0].prompt) for c in row] for row in rows]

    monkeypatch.setattr(before_after, "before_after", answers)
    monkeypatch.setenv("COLUMNS", "300")
    command = ["edit", tmp_path / "model", "--requests", tmp_path / "requests.jsonl", "--out", tmp_path / "edit"]
    command += ["--device", "cpu", "--leave-out-failed", "--editor"]
    assert run([str(part) for part in [*command, "memit"]]) == 2
    assert "it is not known what each request changes" in capsys.readouterr().err
    assert run([str(part) for part in [*command, "fit"]]) == 0
    assert "left out 2 of 4 requests, which the model does not take or which share" in capsys.readouterr().out
    assert [request.prompt for request in Edit.load(tmp_path / "edit").requests] == [r.prompt for r in asked[1:3]]
