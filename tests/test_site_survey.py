"""Where in a model an edit can act."""

from __future__ import annotations

import pytest
import torch

import families
import worlds
from remend.editors.locate_then_edit import common_questions
from remend.editors.locate_then_edit.site_survey import TOKENS, SiteSurvey, _margin
from remend.errors import FileError, ModelError
from remend.request import as_completion


@pytest.fixture(scope="module")
def taught():
    """A model of four blocks that knows a city of each country, in statements that go on after the country."""
    task = families.task("llama")
    statements = worlds.PHRASINGS[1:]
    pairs = [
        (as_completion(text.replace("{}", country), ""), city)
        for text in statements
        for country, city in zip(worlds.COUNTRIES[:6], worlds.CITIES[:6], strict=True)
    ]
    worlds.teach(task, task.collate([task.encode(prompt, answer) for prompt, answer in pairs]))
    return task


@pytest.fixture
def bank(monkeypatch):
    texts = {
        "reference_subjects": worlds.COUNTRIES[:6],
        "questions": {
            "one": {"statements": [worlds.PHRASINGS[1]], "questions": []},
            "two": {"statements": [worlds.PHRASINGS[2]], "questions": []},
            "short": {"statements": ["The capital of {} is"], "questions": []},
        },
    }
    monkeypatch.setattr(common_questions, "_bank", lambda: texts)
    common_questions.frames.cache_clear()
    yield texts
    common_questions.frames.cache_clear()


def test_answers_follow_the_subject_first_and_the_last_token_in_the_end(taught, bank):
    survey = SiteSurvey.measure(taught)
    assert survey.apart.shape == survey.moved.shape == (len(TOKENS), len(survey.blocks))
    assert survey.blocks == (0, 1, 2)
    assert survey.moved[0, 0] > survey.moved[0, -1]
    assert survey.moved[2, -1] > survey.moved[2, 0]
    block, token = survey.best
    assert block in survey.blocks
    assert token in TOKENS
    lines = survey.picture().splitlines()
    assert len(lines) == 2 * (1 + len(TOKENS)) + 1


def test_a_survey_is_kept_on_disk_and_damage_is_found(taught, bank, tmp_path, monkeypatch):
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path))
    survey = SiteSurvey.load_or_measure(taught)
    monkeypatch.setattr(SiteSurvey, "measure", None)
    again = SiteSurvey.load_or_measure(taught)
    assert torch.equal(survey.apart, again.apart)
    assert torch.equal(survey.moved, again.moved)
    (entry,) = tmp_path.iterdir()
    (entry / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileError):
        SiteSurvey.load(entry)


def test_directions_tell_apart_what_differs_in_every_statement():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(1, 8, 32, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 8, 32, generator=generator, dtype=torch.float64)
    assert _margin(own + 0.1 * noise) > 0.8
    assert _margin(noise) < 0.3


def test_models_without_a_choice_of_blocks_say_so():
    with pytest.raises(ModelError, match="decoders"):
        SiteSurvey.measure(families.task("t5-gated"))
