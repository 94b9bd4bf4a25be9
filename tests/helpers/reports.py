"""Attributions to make reports of: small, with pictures and with texts."""

from __future__ import annotations

import torch

from trak_ext import report
from trak_ext.evaluation import LDS

NUM_TRAIN = 30
HOSTILE = "<script>document.title = 'owned'</script> \" ' & </style> <img src=x onerror=alert(1)>"


def make_attributions(num_targets=4, shown=3, *, scale=1.0, **changes):
    """Pictures of two sizes and shapes, labels, predictions, LDS and settings."""
    g = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(num_targets, NUM_TRAIN, generator=g)
    train = [report.Item(torch.rand(8, 8, generator=g), label=i % 3) for i in range(NUM_TRAIN)]
    targets = [
        report.Item(torch.rand(3, 70, 90, generator=g), label=i % 3, prediction=1, id=f"target {i}")
        for i in range(num_targets)
    ]
    arguments = {
        "targets": targets,
        "proponents": tuple(scores.topk(shown)),
        "opponents": tuple(scores.topk(shown, largest=False)),
        "train_items": train,
        "lds": make_lds(0.5),
        "target_lds": [i / num_targets for i in range(num_targets)],
        "settings": {"proj_dim": 512, "damping": 1.0, "task": "image_classification"},
        "fingerprint": "ab" * 16,
    }
    return report.Attributions(**(arguments | changes))


def make_lds(mean):
    return LDS(mean, torch.full((4,), mean), (mean - 0.02, mean + 0.02), (mean - 0.05, mean + 0.05))


def text_items(count, words=30):
    text = "A sentence about projections and kernels. " * words
    return [
        report.Item(text=text[: 40 * (i + 1)] + f"\nEnd {i}.", label=f"package {i % 4}", id=f"f{i}")
        for i in range(count)
    ]
