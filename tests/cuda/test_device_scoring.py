"""Scoring on a CUDA device; what needs one is skipped where there is none."""

from __future__ import annotations

import contextlib

import pytest
import torch

import trak_ext
from cuda_device import built, device
from trak_ext import _C
from trak_ext.estimator.formula import factor_kernel, solve_targets
from trak_ext.kernels import operators, streaming
from trak_ext.kernels.score_pass import SolvedTargets

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {"medium": 2**-7.9, "high": 2**-15, "highest": 2**-20}


def problem(m=2, n=1000, t=70, k=200, dtype=torch.float32):
    """Return features, targets, weights and curvature on the CPU."""
    train, targets = torch.randn(m, n, k).to(dtype), torch.randn(m, t, k).to(dtype)
    return train, targets, torch.rand(m, n), torch.rand(m, n)


def best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = scores.T.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.fixture(params=["plain", "mma", "wgmma"])
def path(request, monkeypatch):
    """Make scoring of fp32 take one path, which the device and build must have."""
    monkeypatch.setenv("TRAK_EXT_CUDA_PATH", request.param)
    try:
        trak_ext.score(torch.ones(1, 2, 8).cuda(), torch.ones(1, 1, 8).cuda(), damping=1.0)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    # The last two: the smallest tiles and the largest, several of them a block.
    [(1, 1, 1, 1), (2, 1000, 70, 200), (3, 129, 16, 65), (2, 777, 30, 64), (1, 60_000, 300, 192)],
)
def test_scores_agree_with_fp64(path, dtype, precision, shape):
    m, n, t, k = shape
    train, targets, weights, _ = problem(m, n, t, k, dtype)
    got = trak_ext.score(train.cuda(), targets.cuda(), weights.cuda(), precision=precision)
    exact = trak_ext.score(train.double(), targets.double(), weights.double())
    kernels = trak_ext.kernel_matrix(train.double())
    solved = torch.stack(
        [solve_targets(factor_kernel(kernels[i], 1.0, 0.0), targets[i]) for i in range(m)]
    )
    bound = (train.double().abs() @ solved.abs().mT).mean(0) * weights.double().mean(0)[:, None]
    tolerance = 2**-40 if dtype == torch.float64 else TOLERANCE[precision]
    assert got.device.type == "cuda"
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((got.cpu().double() - exact).abs() <= tolerance * bound).all()


@device
@pytest.mark.parametrize("leverage", [False, True])
def test_every_option_agrees_with_the_cpu(leverage):
    train, targets, weights, curvature = (x.double() for x in problem())
    options = {"damping": 0.1, "ridge": 0.5, "leverage": leverage}
    expected = trak_ext.score(train, targets, weights, curvature=curvature, **options)
    on_device = [x.cuda() for x in (train, targets, weights)]
    got = trak_ext.score(*on_device, curvature=curvature.cuda(), **options)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-12)
    kernel = trak_ext.kernel_matrix(on_device[0], curvature.cuda())
    got = trak_ext.score(*on_device, curvature=curvature.cuda(), kernel=kernel, **options)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-12)


@device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5, 1024, 1025, 5000])
@pytest.mark.parametrize("largest", [True, False])
def test_top_k_are_the_sorted_scores(dtype, k, largest, monkeypatch):
    train, targets, weights, _ = (x.cuda() for x in problem(1, 5000, 3, 40, dtype))
    scores = trak_ext.score(train, targets, weights)
    values, indices = best(scores if largest else -scores, k)
    for workspace in (0, 2**18, 256 * 2**20):
        monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", workspace)
        got = trak_ext.top_k(train, targets, k, weights, largest=largest)
        assert torch.equal(got.values, values if largest else -values)
        assert torch.equal(got.indices, indices)


@device
def test_workspace_and_batch_make_no_difference(path, monkeypatch):
    train, targets, weights, _ = (x.cuda() for x in problem(3, 700, 150, 90))
    kernel = trak_ext.kernel_matrix(train)
    whole = trak_ext.score(train, targets, weights, kernel=kernel)
    for workspace in (0, 10**5, 10**6):
        monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", workspace)
        assert torch.equal(trak_ext.score(train, targets, weights, kernel=kernel), whole)
    for rows, count in ((slice(5, 77), 9), (slice(5, 6), 1), (slice(300, 700), 33), (slice(9), 65)):
        part = trak_ext.score(train[:, rows], targets[:, :count], weights[:, rows], kernel=kernel)
        assert torch.equal(part, whole[rows, :count])


@device
def test_every_path_keeps_the_largest_scores_of_the_same_samples(path):
    train, targets, weights, _ = (x.cuda() for x in problem(1, 50_000, 40, 100))
    scores = trak_ext.score(train, targets, weights)
    for k in (1, 10, 300):
        got = trak_ext.top_k(train, targets, k, weights)
        values, indices = best(scores, k)
        assert torch.equal(got.values, values)
        assert torch.equal(got.indices, indices)


@device
def test_nan_scores_are_refused():
    train, targets, _, _ = (x.cuda() for x in problem())
    kernel = trak_ext.kernel_matrix(train)
    train[0, 5, 6] = float("nan")
    for k in (3, 1000):
        with pytest.raises(ValueError, match="train_features: expected scores that can be ordered"):
            trak_ext.top_k(train, targets, k, kernel=kernel)


@device
def test_the_callers_stream():
    train, targets, _, _ = (x.cuda() for x in problem())
    expected = trak_ext.score(train, targets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = trak_ext.score(train * 1, targets)
    stream.synchronize()
    assert torch.equal(got, expected)


@device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leverage", [False, True])
def test_features_in_host_memory_are_streamed(dtype, leverage, monkeypatch):
    # Blocks of 37 rows, many times over the same two buffers.
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 37 * 2 * 200 * dtype.itemsize)
    train, targets, weights, curvature = problem(dtype=dtype)
    options = {"leverage": leverage}
    expected = trak_ext.score(
        train.cuda(), targets.cuda(), weights.cuda(), curvature=curvature.cuda(), **options
    )
    got = trak_ext.score(train, targets.cuda(), weights, curvature=curvature, **options)
    assert got.device.type == "cuda"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for largest in (True, False):
        best = trak_ext.top_k(
            train, targets.cuda(), 50, weights, largest=largest, curvature=curvature, **options
        )
        wanted = got.T.sort(dim=1, descending=largest, stable=True)
        torch.testing.assert_close(best.values, wanted.values[:, :50], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(best.values, got.T.gather(1, best.indices), rtol=1e-5, atol=1e-7)


@device
def test_streaming_waits_for_a_slow_stream():
    features = [torch.randn(5000, 256)]
    targets = torch.randn(1, 20, 256, dtype=torch.float64).cuda()
    weights = torch.rand(5000)
    whole = SolvedTargets(targets, torch.float32).score([features[0].cuda()], weights.cuda())

    def in_small_blocks(given):
        return streaming.stream_blocks(given, targets.device, 100 * 1024)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        solved = SolvedTargets(targets, torch.float32, stream=in_small_blocks)
        got = solved.score(features, weights)
    stream.synchronize()
    assert torch.equal(got, whole)


@device
def test_a_consumer_that_raises_leaves_no_copy_behind():
    features = [torch.full((4000, 256), 3.0)]
    transport = streaming.CudaTransport(torch.device("cuda"))

    def consume() -> None:
        blocks = streaming.stream_blocks(features, transport.device, 1024 * 1024, transport)
        next(blocks)
        with torch.cuda.stream(transport.copy_stream):
            torch.cuda._sleep(50_000_000)  # the third block's copy stands behind this
        next(blocks)
        raise RuntimeError("stop")

    with contextlib.suppress(RuntimeError):
        consume()
    others = [torch.zeros(1024, 256, device="cuda") for _ in range(2)]  # of the same memory
    torch.cuda.synchronize()
    assert not any(bool(other.any()) for other in others)


@device
def test_tensors_on_different_devices_get_one_sentence():
    train, targets, weights, _ = problem(n=5, t=2, k=3)
    with pytest.raises(ValueError, match=r"target_features: expected a tensor on cuda:0 as"):
        trak_ext.score(train.cuda(), targets)
    with pytest.raises(ValueError, match=r"weights: expected a tensor on cpu as"):
        trak_ext.score(train, targets, weights.cuda())


def made_up_scoring(features: list[int], n: int, t: int, k: int, dtype: int) -> _C.Scoring:
    return _C.Scoring(
        dtype=dtype,
        features=features,
        row_strides=[k] * len(features),
        feature_dtype=dtype,
        num_train=n,
        num_targets=t,
        proj_dim=k,
        solved=features[0],
        coefficients=0,
        weights=0,
        precision=3,
    )


@built
@pytest.mark.parametrize("wide", [False, True])
def test_workspace_is_bounded(wide):
    def size(
        n: int, t: int, k: int, count: int, limit: int = operators.CUDA_WORKSPACE_BYTES
    ) -> int:
        scoring = made_up_scoring([0] * 10, n, t, k, 0 if wide else 1)
        return _C.cuda_workspace_bytes(scoring, limit, count=count)

    assert size(10**9, 10**6, 8192, 0) == (0 if wide else 256 * 2**20)
    assert size(10**9, 10**6, 8192, 1024) == 256 * 2**20
    assert size(2**40, 2**40, 2**20, 1024) <= 512 * 2**20  # a tile of targets needs more
    # Tiles of 64 targets and 16 features, or of 32 and 64: what either path needs.
    assert size(100, 20, 16, 0) == (0 if wide else 32 * 64 * 2 * 3 * 10)
    assert size(100, 20, 16, 0, limit=0) == (0 if wide else 32 * 64 * 2 * 3)
    assert size(0, 20, 16, 5) == size(100, 0, 16, 5) == 0


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["float", "double"])
def test_without_a_device_there_is_an_error_and_no_result(name):
    dtype, code = (torch.float64, 0) if name == "double" else (torch.float32, 1)
    features, out = torch.ones(1, 8, dtype=dtype), torch.zeros(4, dtype=dtype)
    address = out.data_ptr()
    scoring = made_up_scoring([features.data_ptr()], 1, 1, 8, code)
    how = {"path": "plain", "workspace": 0, "workspace_bytes": 0, "device": 0, "stream": 0}
    with pytest.raises(RuntimeError, match=r"^CUDA: ") as error:
        _C.cuda_score(scoring, out=address, out_row_stride=1, out_target_stride=1, **how)
    assert "\n" not in str(error.value)
    outputs = {"values": address, "indices": address, "not_a_number": address}
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        _C.cuda_top_k(scoring, count=1, **outputs, **how)
    assert (out == 0).all()


def test_other_devices_and_precisions_are_refused():
    train, targets, _, _ = problem(n=5, t=2, k=3)
    with pytest.raises(ValueError, match="train_features: expected a CPU or CUDA tensor, got"):
        trak_ext.score(train.to("meta"), targets)
    with pytest.raises(ValueError, match="weights: expected a tensor on cpu as features"):
        trak_ext.score(train, targets, torch.ones(2, 5, device="meta"))
    with pytest.raises(ValueError, match="precision: expected one of 'medium', 'high', 'highest'"):
        trak_ext.score(train, targets, precision="tf32")
