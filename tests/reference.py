"""The paper, written literally, with its ablations: dense, slow, one edit at a time. The package must agree with it.

Nothing here uses the package's mathematics. Weights are materialised, one episode is one backward pass, every token
goes through Eq. 3 by itself, and statistics are taken over a list of all tokens at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D


@dataclass
class Text:
    """One prompt with its target, as token ids (the target ends with the end token)."""

    prompt: list[int]
    target: list[int]


def predictions(model, text, weights=None):
    """Logits that predict each target token, from the model with some weights replaced."""
    ids = torch.tensor([text.prompt + text.target])
    logits = functional_call(model, weights or {}, (), {"input_ids": ids}).logits[0]
    return logits[len(text.prompt) - 1 : -1]


def negative_log_likelihood(logits, target):
    """−log p(y|x), a token's mean."""
    return torch.stack([-logits[i].log_softmax(0)[t] for i, t in enumerate(target)]).mean()


def kullback_leibler(base, edited):
    """KL(p_base ‖ p_edited), a token's mean."""
    total = 0
    for p, q in zip(base, edited, strict=True):
        total = total + (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()
    return total / len(base)


def tokens_of_gradient(model, names, text):
    """For each layer its (u, δ) at every token with δ ≠ 0, the dense gradient of its weight, and all inputs."""
    modules = dict(model.named_modules())
    inputs, outputs, handles = {}, {}, []
    for name in names:

        def keep(module, args, output, name=name):
            inputs[name] = args[0].detach().clone()
            output.retain_grad()
            outputs[name] = output

        handles.append(modules[name].register_forward_hook(keep))
    weights = {f"{name}.weight": modules[name].weight.detach().clone().requires_grad_() for name in names}
    negative_log_likelihood(predictions(model, text, weights), text.target).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name in names:
        pairs = [(u, d) for u, d in zip(inputs[name][0], outputs[name].grad[0], strict=True) if d.abs().sum() > 0]
        dense = weights[f"{name}.weight"].grad
        dense = dense.T if isinstance(modules[name], Conv1D) else dense
        found[name] = (pairs, dense, inputs[name][0][:-1])  # the last token predicts nothing
    return found


def statistics(rows):
    """Mean and standard deviation of each dimension over all rows, the deviation at least 0.001 of the layer's."""
    rows = torch.stack(rows)
    variance = ((rows - rows.mean(0)) ** 2).sum(0) / (len(rows) - 1)
    floor = variance.mean() * 1e-6
    return rows.mean(0), torch.sqrt(torch.maximum(variance, floor))


def whitener(rows, prompts, ridge):
    """(C + ridge · mean eigenvalue)^(−1/2) for C = E[u uᵀ], scaled so that the rows keep their mean square.

    The ridge is at least what Ledoit and Wolf's estimate of the weight of the identity makes of so few prompts.
    """
    rows = torch.stack(rows).double()
    moment = sum(torch.outer(u, u) for u in rows) / len(rows)
    spread = sum(((torch.outer(u, u) - moment) ** 2).sum() for u in rows) / len(rows) / prompts
    weight = spread / ((moment - moment.trace() / len(moment) * torch.eye(len(moment))) ** 2).sum()
    weight = min(float(weight), 0.999)
    ridge = max(ridge, weight / (1 - weight))
    values, vectors = torch.linalg.eigh(moment + ridge * moment.trace() / len(moment) * torch.eye(len(moment)))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    scale = (rows**2).mean().sqrt() / ((rows @ root) ** 2).mean().sqrt()
    return (root * scale).float()


def relu(x):
    """max(x, 0), with derivative 1 at 0."""
    return torch.where(x >= 0, x, torch.zeros_like(x))


class Reference(nn.Module):
    """Eq. 2 and 3 for every edited matrix: shared U, V and b for each shape, own s, o and α for each matrix.

    And as section 5.4 ablates it: own U, V and b for each matrix (not ``share``), inputs as they are (not
    ``normalise``), only u or only δ transformed (``transforms``). How U starts is a matter of ``parameters``.
    """

    def __init__(self, model, names, parameters, edit_weight, share=True, normalise=True, transforms="both"):
        super().__init__()
        self.model, self.names, self.edit_weight = [model], names, edit_weight
        self.normalise, self.transforms = normalise, transforms
        modules = dict(model.named_modules())
        self.shape = {}
        for name in names:
            rows, columns = modules[name].weight.shape
            self.shape[name] = (rows, columns) if isinstance(modules[name], Conv1D) else (columns, rows)
        self.place = {}
        for name in names:
            same = [n for n in names if self.shape[n] == self.shape[name]]
            key = "networks.{}x{}".format(*self.shape[name])
            self.place[name] = (key, same.index(name)) if share else ("networks." + name.replace(".", "/"), 0)
        self.p = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}

    def take_statistics(self, texts, ridge):
        """Normalisation (and whitening, if asked for) over the training set's edit pairs."""
        found = [tokens_of_gradient(self.model[0], self.names, text) for text in texts]
        self.white = {n: torch.eye(self.shape[n][0]) for n in self.names}
        if ridge:
            self.white = {n: whitener([u for f in found for u in f[n][2]], len(texts), ridge) for n in self.names}
        self.u_norm = {n: statistics([self.white[n] @ u for f in found for u, _ in f[n][0]]) for n in self.names}
        self.d_norm = {n: statistics([d for f in found for _, d in f[n][0]]) for n in self.names}

    def reads(self, name):
        """Which of u and δ the network of a matrix transforms."""
        d_in, d_out = self.shape[name]
        if self.transforms == "smaller":
            return ["u"] if d_in <= d_out else ["delta"]
        return ["u", "delta"] if self.transforms == "both" else [self.transforms]

    def g(self, name, u, d):
        """Eq. 3 for one token of one matrix."""
        key, index = self.place[name]
        p, reads = self.p, self.reads(name)
        (u_mean, u_std), (d_mean, d_std) = self.u_norm[name], self.d_norm[name]
        u = self.white[name] @ u
        parts = {"u": u, "delta": d}
        if self.normalise:
            parts = {"u": (u - u_mean) / u_std, "delta": (d - d_mean) / d_std}
        z = torch.cat([parts[part] for part in reads])
        inner = p[f"{key}.first.up"] @ (p[f"{key}.first.down"] @ z) + p[f"{key}.first.bias"]
        h = z + relu(p[f"{key}.first.scale"][index] * inner + p[f"{key}.first.offset"][index])
        inner = p[f"{key}.second.up"] @ (p[f"{key}.second.down"] @ h)
        out = h + relu(p[f"{key}.second.scale"][index] * inner + p[f"{key}.second.offset"][index])
        new = {"u": u, "delta": d, **dict(zip(reads, out.split([len(parts[part]) for part in reads]), strict=True))}
        return self.white[name] @ new["u"], new["delta"]

    def edited_weights(self, text):
        """W̃ = W − α Σ_j δ̃_j ũ_jᵀ for every edited matrix, in the layer's own layout."""
        model = self.model[0]
        modules = dict(model.named_modules())
        weights = {}
        for name, (pairs, *_) in tokens_of_gradient(model, self.names, text).items():
            gradient = torch.zeros(self.shape[name][1], self.shape[name][0])
            for u, d in pairs:
                new_u, new_d = self.g(name, u, d)
                gradient = gradient + torch.outer(new_d, new_u)
            step = self.p["alpha"][self.names.index(name)] * gradient
            weights[f"{name}.weight"] = modules[name].weight.detach() - (
                step.T if isinstance(modules[name], Conv1D) else step
            )
        return weights

    def episode_loss(self, edit, neighbour, locality):
        """Eq. 4 for one episode."""
        model = self.model[0]
        weights = self.edited_weights(edit)
        success = negative_log_likelihood(predictions(model, neighbour, weights), neighbour.target)
        with torch.no_grad():
            base = predictions(model, locality)
        return self.edit_weight * success + kullback_leibler(base, predictions(model, locality, weights))
