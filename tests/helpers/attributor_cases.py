"""Models, data and Attributors for tests, and scores by brute force over them.

Every gradient is made by a loop and the matrix is written out: nothing of the package is shared but
`trak_ext.reference`, the NumPy oracle.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from trak_ext import Attributor, reference

PROJ_DIM = 12
CLASSES = 3


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


def mlp(outputs=CLASSES):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


class Text(nn.Module):
    """Called with keywords; its output has logits. The embedding is the output layer too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask):
        hidden = (self.body(self.embed(input_ids)) * attention_mask[:, :, None]).mean(1)
        return SimpleNamespace(logits=self.head(hidden), loss=None)


def images(count):
    return torch.randn(count, 1, 4, 4), torch.randint(0, CLASSES, (count,))


def vectors(count):
    return torch.randn(count, 4), torch.randint(0, CLASSES, (count,))


def vectors_of_seed(seed):
    torch.manual_seed(seed)
    return vectors(9)


def values(count):
    return torch.randn(count, 4), torch.randn(count)


def texts(count):
    return {
        "input_ids": torch.randint(0, CLASSES, (count, 5)),
        "attention_mask": torch.randint(0, 2, (count, 5)),
        "labels": torch.randint(0, CLASSES, (count,)),
    }


CASES = {
    "image_classification": (conv_net, images),
    "text_classification": (Text, texts),
    "regression": (lambda: mlp(1), values),
}


def states_of(model, count=2):
    """State dicts of `count` checkpoints, running figures of BatchNorm included."""
    states = []
    for _ in range(count):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, tensor in changed.state_dict().items():
                if "var" in name:
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point():
                    tensor.add_(0.2 * torch.randn_like(tensor))
        states.append({name: tensor.clone() for name, tensor in changed.state_dict().items()})
    return states


def batches(data, size):
    """The samples in batches: tuples or mappings, as they came."""
    if isinstance(data, dict):
        pieces = {key: tensor.split(size) for key, tensor in data.items()}
        return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]
    return list(zip(*(tensor.split(size) for tensor in data), strict=True))


def double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def by_hand(task, model, sample):
    """f and Q of a batch of one sample, from p itself."""
    if isinstance(sample, dict):
        inputs = {key: double(value) for key, value in sample.items() if key != "labels"}
        prediction, label = model(**inputs).logits[0], sample["labels"][0]
    else:
        prediction, label = model(double(sample[0]))[0], double(sample[1])[0]
    if task == "regression":
        return prediction[0], label - prediction[0]
    p = prediction.softmax(0)[label]
    return (p / (1 - p)).log(), 1 - p


def brute_force(task, model, states, train, test, *, damping=1.0, kind="sjlt", seed=0,
                names=None, nnz=1):  # fmt: skip
    """Scores [n, t] in fp64, and the training features [M, n, k]."""

    def features(state, m, data):
        copied = copy.deepcopy(model).double()
        copied.load_state_dict(state)
        copied.eval()
        chosen = [p for name, p in copied.named_parameters() if names is None or name in names]
        rows, weights = [], []
        for sample in batches(data, 1):
            f, q = by_hand(task, copied, sample)
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, chosen)]))
            weights.append(float(q.detach()))
        matrix = reference.projection_matrix(
            sum(parameter.numel() for parameter in chosen), PROJ_DIM, kind=kind, seed=seed,
            model_id=m, nnz=nnz,
        )  # fmt: skip
        return torch.stack(rows).numpy() @ matrix.astype(np.float64), weights

    phi, q = zip(*(features(state, m, train) for m, state in enumerate(states)), strict=True)
    targets = np.stack([features(state, m, test)[0] for m, state in enumerate(states)])
    phi = np.stack(phi)
    return reference.score(phi, targets, np.array(q), damping=damping), phi


def attributor(model, task="image_classification", **options):
    return Attributor(
        model,
        task,
        **{"proj_dim": PROJ_DIM, "damping": 1.0, "curvature": None, "progress": False, **options},
    )


def assert_scores(got, expected, tolerance=1e-4):
    """Per target, the largest difference against the largest score."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    difference = np.abs(got.double().numpy() - expected).max(0)
    assert (difference <= tolerance * np.abs(expected).max(0)).all(), difference
