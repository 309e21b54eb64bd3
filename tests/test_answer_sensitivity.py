"""How answers to common questions move with a value: the samples' second moment, the natural gradient, and storage."""

import pytest
import torch

import families
from remend.core.low_rank_hooks import frozen
from remend.editors import load_editor
from remend.editors.locate_then_edit import answer_sensitivity, value_optimization
from remend.editors.locate_then_edit.answer_sensitivity import SUBJECTS, AnswerSensitivity
from remend.editors.locate_then_edit.common_questions import frames
from remend.editors.locate_then_edit.fit import Fit
from remend.editors.locate_then_edit.subject_prompts import located_subject
from remend.errors import FileError
from remend.models.frozen_prefix import FrozenPrefix

ROWS = 4096


@pytest.fixture(scope="module")
def editor():
    return Fit.create(families.task("llama"), text=families.TEXT)


def test_samples_have_the_fisher_information_as_second_moment(editor):
    task = families.task("llama")
    module = editor.edited_modules(task)[editor.changed_layer]
    text = located_subject(task, "The capital of France is", "France")

    def answers(value):
        batch = value_optimization.SubjectBatch(task, [[text]], FrozenPrefix(task.model, []))
        with value_optimization.add_at_subject(module, batch, value[None]):
            return batch.outputs()[0].float().log_softmax(-1)

    with frozen(task.model):
        jacobian = torch.autograd.functional.jacobian(answers, torch.zeros(editor.shapes[editor.changed_layer][1]))
        exact = jacobian.T @ (answers(torch.zeros(jacobian.shape[1])).exp()[:, None] * jacobian)
        batch = value_optimization.SubjectBatch(task, [[text]] * ROWS, FrozenPrefix(task.model, []))
        with torch.no_grad():
            samples = answer_sensitivity._sample(batch, module, torch.Generator().manual_seed(0))
    assert (samples.T @ samples / ROWS - exact).norm() < 0.1 * exact.norm()


def test_all_statements_are_read_about_several_subjects(editor):
    gradients = editor.sensitivity.gradients
    assert gradients.shape == (len(frames("statements")), SUBJECTS, 16)
    assert gradients.isfinite().all()
    assert (gradients.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("d", [400, 800])  # fewer dimensions than samples, and more
@pytest.mark.parametrize("without", [(), ("capital", "language")])
def test_the_natural_gradient(d, without):
    torch.manual_seed(0)
    statements = frames("statements")
    gradients = torch.randn(len(statements), SUBJECTS, d, dtype=torch.float64) * torch.linspace(0, 2, d)
    given = torch.randn(3, d, dtype=torch.float64)
    counted = torch.tensor([frame.question not in without for frame in statements])
    assert counted.all() == (not without)
    rows = gradients[counted].flatten(0, 1)
    fisher = rows.T @ rows / len(rows)
    ridge = 0.1 * fisher.trace() / d
    expected = ridge * torch.linalg.solve(fisher + ridge * torch.eye(d), given.T).T
    natural = AnswerSensitivity(gradients.float()).natural_gradient(0.1, without)
    assert torch.allclose(natural(given), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(natural(given[0]), natural(given[:1])[0])


def test_answers_that_nothing_moves_change_no_direction():
    given = torch.randn(2, 4)
    sensitivity = AnswerSensitivity(torch.zeros(len(frames("statements")), SUBJECTS, 4))
    assert torch.equal(sensitivity.natural_gradient(0.1)(given), given)


def test_an_editor_keeps_it_and_refuses_one_that_does_not_fit(editor, tmp_path):
    loaded = load_editor(editor.save(tmp_path / "editor"))
    assert torch.equal(loaded.sensitivity.gradients, editor.sensitivity.gradients)
    narrower = AnswerSensitivity(editor.sensitivity.gradients[..., 1:])
    editor.sensitivity, kept = narrower, editor.sensitivity
    try:
        folder = editor.save(tmp_path / "other")
    finally:
        editor.sensitivity = kept
    with pytest.raises(FileError, match="sensitivity of answers"):
        load_editor(folder)


def test_an_encoder_decoder_has_none():
    editor = Fit.create(families.task("t5"), text=families.TEXT)
    assert editor.sensitivity is None
    given = torch.randn(2, 16)
    assert torch.equal(editor.natural_gradient()(given), given)
