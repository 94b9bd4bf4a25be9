"""Models with their batches, and their per-sample gradients by a loop of torch.autograd.grad."""

from __future__ import annotations

import copy

import torch
from torch import nn

from trak_ext.tasks import TASKS

CLASSIFICATION = TASKS["image_classification"]
CLASSES = 4


class TiedText(nn.Module):
    """Embedding whose weight is the output layer's as well."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(1))


class Attention(nn.Module):
    """Written out, since torch's own has no batching rule on the CPU and says so."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens):
        q, k, v = self.qkv(self.norm(self.embed(tokens))).chunk(3, -1)
        weights = (q @ k.transpose(1, 2)).masked_fill((tokens == 0)[:, None], -1e9).softmax(-1)
        return self.head((weights @ v).mean(1))


class Unused(nn.Module):
    """With a parameter that f does not depend on, one without elements, and a scalar one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, CLASSES)
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.first(x) * self.scale


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, CLASSES))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def numbers(*shape):
    return lambda count: torch.randn(count, *shape)


def tokens(high):
    return lambda count: torch.randint(0, high, (count, 5))


class UsedTwice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


MODELS = {
    "mlp": (mlp, numbers(5)),
    "used twice": (UsedTwice, numbers(5)),
    "conv": (conv_net, numbers(2, 4, 4)),
    "tied": (TiedText, tokens(CLASSES)),
    "attention": (Attention, tokens(11)),
    "unused": (Unused, numbers(5)),
}


def make(name, count=6):
    model, inputs = MODELS[name][0](), MODELS[name][1](count)
    return model, (inputs, torch.randint(0, CLASSES, (count,)))


def other_weights(model):
    """A state dict unlike the model's own, running figures of BatchNorm included."""
    with torch.no_grad():
        changed = copy.deepcopy(model)
        for name, tensor in changed.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand_like(tensor) if "var" in name else tensor + 0.3)
    return {name: tensor.clone() for name, tensor in changed.state_dict().items()}


def output_by_hand(logits, label):
    return logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).logsumexp(0)


def loop(model, weights, batch, names=None, output=output_by_hand, dtype=torch.float64):
    """Gradients {name: [B, *shape]} and f [B], one autograd.grad a sample."""
    model = copy.deepcopy(model).to(dtype)
    model.load_state_dict(weights)
    model.eval()
    named = dict(model.named_parameters())
    names = list(named) if names is None else names
    inputs, labels = batch
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    rows, outputs = [], []
    for x, y in zip(inputs, labels, strict=True):
        f = output(model(x[None])[0], y)
        chosen = [named[name] for name in names]
        rows.append(torch.autograd.grad(f, chosen, allow_unused=True, materialize_grads=True))
        outputs.append(f.detach())
    grads = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
    return grads, torch.stack(outputs)


def collect(computer, weights, batch):
    parts = list(computer(weights, batch))
    grads = {
        name: torch.cat([p.rows[name].dense() if name in p.rows else p.grads[name] for p in parts])
        for name in computer.names
    }
    return grads, torch.cat([part.output for part in parts])


def assert_same(got, expected, tolerance):
    assert list(got) == list(expected)
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad.numel())
    for name, grad in expected.items():
        assert got[name].shape == grad.shape, name
        if grad.numel():
            assert float((got[name] - grad).abs().max()) <= tolerance * largest, name
