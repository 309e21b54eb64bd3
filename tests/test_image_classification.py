"""Image classifiers: edited, verified, reverted, saved, trained for and evaluated, as language models are."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image as PillowImage

import remend
from remend.editors import Mend, make
from remend.errors import RequestError
from remend.evaluation.neighbourhood import measure_neighbourhood
from remend.request import parse_request
from remend.tasks.image_classification import Image
from remend.training import PRESETS

LABELS = dict(enumerate(("cat", "dog", "bird", "fish")))
SIZE = 32


def vit():
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=SIZE,
            patch_size=8, id2label=LABELS,
        )
    )  # fmt: skip


def convnext():
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            patch_size=4,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            image_size=SIZE,
            id2label=LABELS,
            layer_scale_init_value=1.0,  # 1e-6 by default: blocks that were never trained would do nothing
        )
    )


def resnet():
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", id2label=LABELS
        )
    )


MODELS = {"vit": vit, "convnext": convnext, "resnet": resnet}


def pixels(picture):
    """The transform of a plain pipeline: a tensor [channel, height, width] between -1 and 1."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(params=MODELS)
def task(request):
    torch.manual_seed(0)
    return remend.wrap(MODELS[request.param]().eval(), pixels)


@pytest.fixture
def images(tmp_path):
    """A function that writes random images and returns their paths."""
    rng = np.random.default_rng(0)

    def write(count):
        paths = [tmp_path / f"{rng.integers(1 << 40)}.png" for _ in range(count)]
        for path in paths:
            PillowImage.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        return [str(path) for path in paths]

    return write


def image_requests(images, count):
    labels = list(LABELS.values())
    requests = []
    for number in range(count):
        prompt, paraphrase, near, far = images(4)
        written = {
            "image": prompt, "target": labels[number % 4], "subject": f"object {number}", "paraphrases": [paraphrase],
            "near": [{"image": near, "target": "cat"}], "locality": [{"image": far, "target": "cat"}],
        }  # fmt: skip
        requests.append(parse_request(json.dumps(written), "here"))
    return requests


def other_label(task, request):
    """The request with a label that the model does not give already."""
    (label,) = remend.answers(task, [request.prompt])
    return request.model_copy(update={"target": next(name for name in LABELS.values() if name != label)})


@pytest.mark.parametrize("name", ["finetune", "ridge"])
def test_an_edit_of_one_image_is_verified_reverted_saved_and_loaded(task, images, tmp_path, name):
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    request = other_label(task, image_requests(images, 1)[0])
    old = remend.answers(task, [request.prompt])
    edit = make(name, task).edit(task, [request])
    with edit.applied(task):
        assert remend.answers(task, [request.prompt]) == [request.target]
    assert remend.answers(task, [request.prompt]) == old
    pair = measure_neighbourhood(task, edit, request)[0]
    assert (pair.outcome, pair.distance) == ("followed", 0)
    assert pair.effect > 0
    edit.save(tmp_path / "edit")
    loaded = remend.Edit.load(tmp_path / "edit")
    assert loaded.requests == (request,)
    merged = loaded.merge(task)
    assert remend.answers(task, [request.prompt]) == [request.target]
    merged.revert()
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.state_dict().items())


def test_mend_is_trained_for_a_hundred_steps_and_evaluated(task, images):
    network, settings = PRESETS["default"]
    requests = image_requests(images, 24)
    editor = remend.train(
        task, requests[:16], requests[16:], editor=Mend.create(task, replace(network, rank=8)),
        config=replace(settings, max_steps=100, validate_every=50, batch_size=8),
    )  # fmt: skip
    history = editor.trained["history"]
    assert [entry["step"] for entry in history] == [0, 50, 100]
    assert history[-1]["loss"] < history[0]["loss"], "training lowers the outer loss"
    metrics = remend.evaluate(task, editor, requests[16:20]).metrics()
    assert metrics.keys() >= {"reliability", "generality", "locality_far", "locality_near"}
    assert all(summary.n == 4 for summary in metrics["reliability"].values())


def test_requests_of_images_are_written_and_read_back(images):
    request = image_requests(images, 1)[0]
    written = request.to_json()
    assert written["image"] == request.prompt.path
    assert isinstance(request.paraphrases[0], Image)
    assert isinstance(request.near[0].prompt, Image)
    assert parse_request(json.dumps(written), "again") == request


def test_what_is_not_an_image_is_refused(images, tmp_path):
    task = remend.wrap(vit().eval(), pixels)
    (path,) = images(1)
    with pytest.raises(RequestError, match=r'classifies images: give \{"image": "file"\}, not \'Oslo'):
        task.encode("Oslo is", "cat")
    with pytest.raises(RequestError, match="cannot read the image"):
        task.encode(Image(str(tmp_path / "missing.png")), "cat")
    with pytest.raises(RequestError, match=r"has no label 'cow'; .*a number from 0 to 3 will do too"):
        task.encode(Image(path), "cow")
    with pytest.raises(RequestError, match="image: should be the path of an image file, not 7"):
        parse_request('{"image": 7, "target": "cat"}', "here")
    with pytest.raises(RequestError, match="give prompt or image, not both"):
        parse_request(json.dumps({"image": path, "prompt": "Oslo", "target": "cat"}), "here")


@pytest.mark.skipif(
    type(hf.AutoImageProcessor).__name__ == "DummyObject", reason="this version of transformers needs torchvision too"
)
def test_a_model_folder_with_an_image_processor_is_loaded(tmp_path, images):
    vit().save_pretrained(tmp_path / "model")
    processor = hf.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(tmp_path / "model")
    task = remend.load(str(tmp_path / "model"), "cpu")
    assert task.kind == "image-classification"
    (path,) = images(1)
    example = task.encode(Image(path), "dog")
    assert example.input.tensor.shape == (3, SIZE, SIZE)
    assert example == task.encode(Image(path), "1")
    assert remend.answers(task, [Image(path)])[0] in LABELS.values()
