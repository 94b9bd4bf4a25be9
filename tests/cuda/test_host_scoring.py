"""The CUDA scoring's kernels, run on the host from their own source, against fp64.

What a GPU would forgive is an error here: see cuda_host/device_host.h.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cuda_host.library import WARPGROUP
from cuda_host.scoring_cases import (
    DTYPES,
    MMA,
    PRECISIONS,
    TOLERANCE,
    WIDE,
    best,
    check,
    exact,
    make,
)
from cuda_host.scoring_library import ScoringLibrary
from trak_ext import _C
from trak_ext.kernels import cuda_paths, operators
from trak_ext.kernels.score_pass import SolvedTargets


@pytest.fixture(scope="module")
def library() -> ScoringLibrary:
    return ScoringLibrary()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpoints", [1, 3])
@pytest.mark.parametrize("targets", [5, 70])
def test_every_dtype_precision_and_tile(library, dtype, precision, checkpoints, targets):
    for scaled in (True, False):
        problem = make(checkpoints, 40, targets, 90, dtype, scaled)
        check(library, *problem, precision)


@pytest.mark.parametrize("name", ["coefficients", "weights"])
@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_coefficients_and_weights_alone(library, name, precision):
    features, solved, scales = make(2, 20, 3, 20)
    check(library, features, solved, {name: scales[name]}, precision)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("scaled", [True, False])
def test_fp64_throughout(library, dtype, scaled):
    features, solved, scales = make(3, 70, 66, 90, WIDE, scaled)
    check(library, [phi.to(dtype) for phi in features], solved, scales, "plain")


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_samples_around_tile_borders(library, precision):
    for rows in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257):
        check(library, *make(1, rows, 3, 18), precision)


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_targets_around_tile_borders(library, precision):
    for targets in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129):
        check(library, *make(1, 5, targets, 18), precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["plain", "highest", "warpgroup highest"])
def test_features_around_step_borders(library, dtype, precision):
    for proj_dim in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 81, 127, 128, 129):
        for checkpoints in (1, 2):
            check(library, *make(checkpoints, 3, 2, proj_dim, dtype), precision)


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_zero_sizes(library, precision):
    for checkpoints, rows, targets in ((1, 0, 3), (1, 3, 0), (1, 0, 0)):
        got = library.score(*make(checkpoints, rows, targets, 8, scaled=False)[:2])
        assert got.shape == (rows, targets)
    features, solved, scales = make(2, 3, 4, 0)
    assert (library.score(features, solved, precision=precision, **scales) == 0).all()
    values, indices, bad = library.top_k(features, solved, 2, precision=precision)
    assert (values == 0).all()
    assert indices.tolist() == [[0, 1]] * 4
    assert not bad


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(library, dtype):
    for precision in PRECISIONS:
        features = [torch.randint(-100, 101, (33, 200)).to(dtype) for _ in range(2)]
        solved = torch.randint(-100, 101, (2, 20, 200)).float()
        weights = torch.randint(-3, 4, (33,)).float()
        got = library.score(features, solved, precision=precision, weights=weights)
        assert torch.equal(got.double(), exact(features, solved, weights=weights)[0])


def test_highest_keeps_what_two_parts_would_lose(library):
    # One product a score: the kept products of parts, and one addition that truncates, are within
    # 2^-22 of it. Without a third part, some of these are off by 2^-17 or so.
    features, solved, _ = make(1, 128, 64, 1, scaled=False)
    for dtype in DTYPES:
        halves = [phi.to(dtype) for phi in features]
        scores, bound = exact(halves, solved)
        for path in ("", WARPGROUP):
            highest = library.score(halves, solved, precision=path + "highest").double()
            assert ((highest - scores).abs() / bound).max() <= 2**-22
            high = library.score(halves, solved, precision=path + "high").double()
            assert 2**-19 < ((high - scores).abs() / bound).max() <= 2**-15.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["highest", "warpgroup highest"])
def test_strides_and_alignment_make_no_difference(library, dtype, precision):
    features, solved, scales = make(2, 20, 3, 37, dtype)
    scales["precision"] = precision
    expected = library.score(features, solved, **scales)
    for shift in range(5):
        for pitch in (37, 40, 44, 48):
            moved = []
            for phi in features:
                storage = torch.full((20 * pitch + 8,), float("nan"), dtype=dtype)
                start = shift + (-storage.data_ptr() // phi.element_size()) % 4
                rows = storage[start : start + 20 * pitch].view(20, pitch)
                moved.append(rows[:, :37].copy_(phi))
            assert torch.equal(library.score(moved, solved, **scales), expected)
    broadcast = [phi[:1].expand(20, 37) for phi in features]
    got = library.score(broadcast, solved, precision=precision)
    assert torch.equal(got, got[:1].expand(20, 3))
    for out in (torch.ones(20, 9)[:, 2:5], torch.ones(40, 3)[::2], torch.ones(3, 20).T):
        assert torch.equal(library.score(features, solved, out=out, **scales), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_launch_shape_makes_no_difference(library, precision):
    # Tiles of few and of many targets, targets and checkpoints that fit in a launch, rows of a
    # batch, the order of threads and blocks, tiles that a block makes one after the other.
    features, solved, scales = make(3, 140, 70, 40)
    whole = library.score(features, solved, precision=precision, **scales)
    arguments = {"precision": precision, **scales}
    tile = 64 * 64 * 2 * 3
    for workspace_bytes in (tile, 2 * tile, 3 * tile, 5 * tile):
        part = library.score(
            features,
            solved,
            workspace_bytes=workspace_bytes,
            order_seed=workspace_bytes,
            **arguments,
        )
        assert torch.equal(part, whole)
    for tile_for_targets in (1, 16, 17, 33, 1000):
        for multiprocessors in (1, 3):
            part = library.score(
                features,
                solved,
                tile_for_targets=tile_for_targets,
                multiprocessors=multiprocessors,
                **arguments,
            )
            assert torch.equal(part, whole)
    for rows, targets in ((1, 1), (33, 70), (140, 9)):
        part = library.score(
            [phi[140 - rows :] for phi in features],
            solved[:, :targets].contiguous(),
            precision=precision,
            weights=scales["weights"][140 - rows :].contiguous(),
            coefficients=scales["coefficients"][:, 140 - rows :].contiguous(),
        )
        assert torch.equal(part, whole[140 - rows :, :targets])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", MMA)
def test_both_matrix_instructions_give_the_same_bits(library, dtype, precision):
    # On the host they round alike; what is shown is that sums have the same terms in one order.
    for shape in ((2, 200, 130, 150), (1, 70, 40, 64), (3, 30, 3, 33)):
        features, solved, scales = make(*shape, dtype)
        scales["precision"] = precision
        expected = library.score(features, solved, **scales)
        scales["precision"] = WARPGROUP + precision
        assert torch.equal(library.score(features, solved, **scales), expected)


@pytest.mark.parametrize("precision", ["plain", "highest", "warpgroup highest"])
def test_more_checkpoints_than_a_launch_takes(library, precision):
    check(library, *make(300, 9, 2, 5), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_infinite_coefficient_scales_what_there_is(library, precision):
    # And makes nothing of the features that a kernel fills up with zeros.
    features = [torch.ones(3, 200), torch.ones(3, 200)]
    scales = {"coefficients": torch.ones(2, 3)}
    scales["coefficients"][1, 1] = float("inf")
    expected = torch.tensor([[400.0], [float("inf")], [400.0]]).expand(3, 2)
    for dtype in DTYPES:
        stored = [phi.to(dtype) for phi in features]
        got = library.score(stored, torch.ones(2, 2, 200), precision=precision, **scales)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_floats_stay_finite(library, precision):
    largest = torch.finfo(torch.float32).max
    features = [torch.tensor([[largest], [-largest]])]
    got = library.score(features, torch.tensor([[[0.5], [-0.5]]]), precision=precision)
    ratio = got.double() / (largest * 0.5)
    assert ((ratio.abs() - 1).abs() <= 2**-7).all()


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


@pytest.mark.parametrize("dtype", [WIDE, *DTYPES])
def test_the_python_side_hands_over_what_the_kernels_want(on_host, dtype, monkeypatch):
    features, solved, scales = make(2, 1100, 5, 33, dtype)
    features[1] = features[1].T.contiguous().T  # not what the kernels read as it is
    targets = SolvedTargets(solved, solved.dtype)
    out = torch.empty(5, 1100, dtype=solved.dtype).T
    targets._cuda_score(features, scales["weights"], scales["coefficients"], out)
    scores, bound = exact(features, solved, **scales)
    tolerance = TOLERANCE[WIDE if dtype == WIDE else "highest"]
    assert ((out.double() - scores).abs() <= tolerance * bound).all()
    for k, limit in ((1, 2**28), (30, 0), (1024, 2**28)):
        monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", limit)
        got = targets._cuda_top_k(features, scales["weights"], k, scales["coefficients"])
        assert torch.equal(got.values, best(out, k)[0])
        assert torch.equal(got.indices, best(out, k)[1])
    features[0][7, 7] = float("nan")
    with pytest.raises(ValueError, match="expected scores that can be ordered, got NaN"):
        targets._cuda_top_k(features, scales["weights"], 1, scales["coefficients"])
