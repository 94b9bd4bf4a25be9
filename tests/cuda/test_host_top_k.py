"""The CUDA top-k's kernels, run on the host from their own source, against sorted scores.

What a GPU would forgive is an error here: see cuda_host/device_host.h.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cuda_host.scoring_cases import DTYPES, PRECISIONS, WIDE, best, make
from cuda_host.scoring_library import ScoringLibrary
from trak_ext import _C
from trak_ext.kernels import cuda_paths, operators
from trak_ext.kernels.score_pass import SolvedTargets


@pytest.fixture(scope="module")
def library() -> ScoringLibrary:
    return ScoringLibrary()


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high", WIDE])
@pytest.mark.parametrize(("rows", "targets", "count"), [(1, 1, 1), (300, 70, 7), (3000, 2, 1024)])
def test_top_k_are_the_sorted_scores(library, precision, rows, targets, count):
    features, solved, scales = make(2, rows, targets, 20, WIDE if precision == WIDE else DTYPES[0])
    arguments = {"precision": "plain" if precision == WIDE else precision, **scales}
    expected = best(library.score(features, solved, **arguments), count)
    for workspace_bytes in (2**22, 2**20, 70_000):  # the last: several rounds of samples
        if workspace_bytes == 70_000 and targets > 2:
            continue
        *got, bad = library.top_k(
            features,
            solved,
            count,
            workspace_bytes=workspace_bytes,
            order_seed=workspace_bytes,
            **arguments,
        )
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert not bad


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 512, 513, 700])
def test_top_k_with_ties_up_to_all_samples(library, count):
    features = [torch.randint(-1, 2, (700, 3)).float()]  # few values, both zeros, many ties
    solved = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-0.0, 2.0, 1.0]]])
    scores = library.score(features, solved)
    expected = best(scores, count)
    values, indices, bad = library.top_k(features, solved, count)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])
    assert not bad


@pytest.mark.parametrize(("precision", "step"), [("highest", 16), ("warpgroup highest", 64)])
def test_top_k_in_small_pieces(library, precision, step):
    # The least workspace: one group, one checkpoint and tile of targets at a time, slabs of 1024.
    features, solved, scales = make(2, 2500, 66, 6)
    scales["precision"] = precision
    tile = 64 * step * 2 * 3 + 64 * (5 * 12 + 1024 * 4)
    expected = best(library.score(features, solved, **scales), 5)
    got = library.top_k(features, solved, 5, workspace_bytes=tile, **scales)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    with pytest.raises(RuntimeError, match=f"workspace: expected at least {tile} bytes, got 9"):
        library.top_k(features, solved, 5, workspace_bytes=9, **scales)
    with pytest.raises(RuntimeError, match="count: expected at most 1024, got 1025"):
        library.top_k(features, solved, 1025, **scales)


def test_top_k_of_infinite_scores(library):
    features = [torch.tensor([[-float("inf")], [3.0], [-float("inf")], [float("inf")]])]
    _, indices, bad = library.top_k(features, torch.ones(1, 1, 1), 4, precision="plain")
    assert indices.tolist() == [[3, 1, 0, 2]]
    assert not bad


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_sample_and_nan_is_flagged(library, precision, dtype, poison):
    features, solved, scales = make(2, 20, 3, 20, dtype)
    clean = library.score(features, solved, precision=precision, **scales)
    features[1][13, 17] = poison
    got = library.score(features, solved, precision=precision, **scales)
    others = [i for i in range(20) if i != 13]
    assert torch.equal(got[others], clean[others])
    assert not got[13].isfinite().any()
    bad = library.top_k(features, solved, 2, precision=precision, **scales)[2]
    assert bad == bool(got.isnan().any())


@pytest.fixture
def on_host(library, monkeypatch):
    """Let the Python side of CUDA scoring call the kernels that run on the host."""
    if not hasattr(_C, "CUDA_TOP_K_MAX"):
        pytest.skip("trak_ext was built without CUDA")
    native = SimpleNamespace(
        cuda_score=library.cuda_score,
        cuda_top_k=library.cuda_top_k,
        cuda_workspace_bytes=_C.cuda_workspace_bytes,
    )
    monkeypatch.setattr(SolvedTargets, "_native", lambda self: native)
    monkeypatch.setattr(operators, "cuda_queue", lambda device: {"device": 0, "stream": 0})
    monkeypatch.setattr(
        cuda_paths,
        "scoring_path",
        lambda device, dtype: "plain" if dtype == WIDE else "mma",
    )


def test_top_k_above_the_kernels_is_merged_from_blocks(on_host, monkeypatch):
    features = [torch.randint(-1, 2, (3000, 3)).float()]
    targets = SolvedTargets(torch.ones(1, 2, 3), torch.float32)
    weights = torch.ones(3000)
    monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", 0)
    for k in (1025, 3000):
        got = targets._cuda_top_k(features, weights, k, None)
        expected = best(targets.score(features, weights), k)
        assert torch.equal(got.values, expected[0])
        assert torch.equal(got.indices, expected[1])
