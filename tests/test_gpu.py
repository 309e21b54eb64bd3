"""The same path on a CUDA device; skipped where there is none."""

import pytest
import torch

import remend
import worlds
from remend.editors import Mend, MendConfig
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.training import TrainingConfig, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_edit_and_revert_on_a_gpu(dtype):
    model = worlds.llama().to("cuda", dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = Mend.create(worlds.task(model), MendConfig(rank=16, alpha=0.2, ridge=1e-4, relative=True))
    settings = TrainingConfig(batch_size=8, learning_rate=1e-3, max_steps=10, validate_every=5)
    editor = train(wrap(model, worlds.tokenizer()), worlds.requests(40), config=settings, editor=editor)
    assert editor.device.type == "cuda"
    edit = editor.edit(wrap(model, worlds.tokenizer()), worlds.requests(2))
    task = CausalLM(model, worlds.tokenizer())
    with edit.applied(model):
        task.predict(["Oslo is"], 3)
    with edit.merge(model) if dtype == torch.float32 else edit.applied(model):
        task.predict(["Oslo is"], 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_edit_made_on_a_gpu_serves_on_the_cpu(tmp_path):
    task = remend.load("atlas", "cuda")
    request = remend.read_source("atlas:test")[0]
    remend.Mend.load("atlas").to("cuda").edit(task, [request]).save(tmp_path / "edit")
    task = remend.load("atlas", "cpu")
    with remend.Edit.load(tmp_path / "edit").applied(task.model):
        assert task.predict([request.prompt]) == [task.encode(request.prompt, request.target).target]
