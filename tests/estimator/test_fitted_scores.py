"""Scores of a fitted store by streaming, as on a CUDA device; the rest is in test_estimator.py."""

from __future__ import annotations

import pytest
import torch

from late_transport import LateTransport
from small_setting import fitted, setting
from trak_ext.kernels import score_pass, streaming


@pytest.mark.parametrize("options", [{}, {"leverage": True, "curvature": "mean", "blocks": 2}])
@pytest.mark.parametrize("rows", [8, 1000])
def test_streamed_scores_are_the_same(options, rows, monkeypatch):
    # Where the device is a CUDA one; here all is on the CPU, so the choice is made by hand.
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: rows)
    made = fitted(**options)
    test = setting()[3]
    expected = made.attribute([test])
    best = made.attribute([test], top_k=5)

    streamed = []

    def blocks_on(device, features):
        streamed.append(len(features))
        return streaming.stream_blocks(
            features, device, 3 * 4 * features[0].shape[1], LateTransport()
        )

    monkeypatch.setattr(score_pass, "blocks_on", blocks_on)
    torch.testing.assert_close(made.attribute([test]), expected)
    found = made.attribute([test], top_k=5)
    assert torch.equal(found.indices, best.indices)
    torch.testing.assert_close(found.values, best.values)
    assert streamed
