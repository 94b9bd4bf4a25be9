"""The projection on a CUDA device; what needs one is skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import trak_ext
from cuda_device import built, device
from trak_ext import _C
from trak_ext.kernels import cuda_paths, operators

KINDS = ["rademacher", "normal"]
PRECISIONS = ["medium", "high", "highest"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {"medium": 2**-7, "high": 2**-15, "highest": 2**-20}


def exact_and_bound(grads: torch.Tensor, proj_dim: int, **law) -> tuple[torch.Tensor, torch.Tensor]:
    entries = trak_ext.projection_matrix(grads.shape[1], proj_dim, **law).double()
    values = grads.float().double().cpu()
    return values @ entries, values.abs() @ entries.abs()


@device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("param_offset", [0, 77, 2**39 - 5, 2**62])
def test_matrix_is_that_of_the_cpu(kind, param_offset):
    law = {"kind": kind, "seed": 2**63 + 5, "model_id": 9, "param_offset": param_offset}
    got = trak_ext.projection_matrix(1000, 300, device="cuda", **law)
    assert torch.equal(got.cpu(), trak_ext.projection_matrix(1000, 300, **law))


@device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_unit_vectors_read_the_matrix_back(kind, precision):
    law = {"kind": kind, "seed": 3, "param_offset": 2**32 * 128 - 300}
    got = trak_ext.project(torch.eye(600, device="cuda"), 700, precision=precision, **law)
    assert torch.equal(got.cpu(), trak_ext.projection_matrix(600, 700, **law))


@device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5000, 70), (9, 513, 513), (67, 40001, 600)])
def test_results_agree_with_fp64(kind, precision, dtype, shape):
    rows, num_params, proj_dim = shape
    law = {"kind": kind, "seed": 4, "param_offset": 3}
    grads = torch.randn(rows, num_params, device="cuda").to(dtype)
    exact, bound = exact_and_bound(grads, proj_dim, **law)
    got = trak_ext.project(grads, proj_dim, precision=precision, **law)
    assert ((got.cpu().double() - exact).abs() <= TOLERANCE[precision] * bound + 1e-30).all()


@device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_integers_are_those_of_the_cpu_to_the_bit(dtype, precision):
    grads = torch.randint(-100, 101, (33, 100001)).to(dtype)
    on_cpu = trak_ext.project(grads, 530, param_offset=1)
    on_cuda = trak_ext.project(grads.cuda(), 530, param_offset=1, precision=precision)
    assert torch.equal(on_cuda.cpu(), on_cpu)


@device
@pytest.mark.parametrize("kind", KINDS)
def test_batch_repeat_strides_and_workspace_make_no_difference(kind, monkeypatch):
    grads = torch.randn(70, 50001, device="cuda")
    whole = trak_ext.project(grads, 600, kind=kind)
    for rows in (1, 2, 8, 9, 16, 17, 31, 33):
        assert torch.equal(
            trak_ext.project(grads[3 : 3 + rows], 600, kind=kind), whole[3 : 3 + rows]
        )
    transposed = grads.T.contiguous().T
    shifted = torch.empty(grads.numel() + 1, device="cuda")[1:].view_as(grads).copy_(grads)
    for same in (grads, transposed, shifted):
        assert torch.equal(trak_ext.project(same, 600, kind=kind), whole)
    for size in (0, 2**20, 2**24):
        monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", size)
        assert torch.equal(trak_ext.project(grads, 600, kind=kind), whole)


@device
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_row(precision, poison):
    grads = torch.randn(20, 3000, device="cuda")
    clean = trak_ext.project(grads, 70, precision=precision)
    grads[13, 777] = poison
    got = trak_ext.project(grads, 70, precision=precision)
    others = [i for i in range(20) if i != 13]
    assert torch.equal(got[others], clean[others])
    expected = poison * trak_ext.projection_matrix(3000, 70)[777]
    assert torch.equal(got[13].cpu().nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@device
def test_out_mapping_and_zero_sizes():
    grads = torch.randint(-9, 10, (6, 300), device="cuda").float()
    expected = 1 + trak_ext.project(grads, 21)
    for out in (torch.ones(6, 50, device="cuda")[:, 3:24], torch.ones(21, 6, device="cuda").T):
        trak_ext.project({"a": grads[:, :77], "b": grads[:, 77:]}, 21, out=out)
        assert torch.equal(out, expected)
    for rows, num_params, proj_dim in ((0, 5, 6), (4, 0, 6), (4, 5, 0)):
        got = trak_ext.project(torch.ones(rows, num_params, device="cuda"), proj_dim)
        assert torch.equal(got, torch.zeros(rows, proj_dim, device="cuda"))


@device
def test_the_callers_stream_and_graphs():
    grads = torch.randn(5, 30000, device="cuda")
    expected = trak_ext.project(grads, 256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = grads * 2
        got = trak_ext.project(late, 256)  # ordered behind what the stream still does
    stream.synchronize()
    assert torch.equal(got, 2 * expected)

    static = torch.zeros_like(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trak_ext.project(static, 256)
    static.copy_(grads)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    grads = torch.randn(5, 3000)
    expected = trak_ext.project(grads.to("cuda:0"), 40)
    got = trak_ext.project(grads.to("cuda:1"), 40)
    assert torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), expected.cpu())


@device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", ["plain", "mma", "wgmma"])
def test_every_path_agrees_with_fp64(kind, precision, path, monkeypatch):
    monkeypatch.setenv("TRAK_EXT_CUDA_PATH", path)
    try:
        assert cuda_paths.projection_path(torch.device("cuda"), 3) == path
    except ValueError as error:
        pytest.skip(str(error))
    law = {"kind": kind, "seed": 4, "param_offset": 3}
    for rows in (3, 9, 17, 33, 67):
        grads = torch.randn(rows, 40001, device="cuda")
        exact, bound = exact_and_bound(grads, 600, **law)
        got = trak_ext.project(grads, 600, precision=precision, **law)
        assert ((got.cpu().double() - exact).abs() <= TOLERANCE[precision] * bound + 1e-30).all()
    integers = torch.randint(-100, 101, (70, 9001), device="cuda").float()
    got = trak_ext.project(integers, 530, kind="rademacher", precision=precision)
    expected = trak_ext.project(integers.cpu(), 530, kind="rademacher")
    assert torch.equal(got.cpu(), expected)


@device
def test_a_path_that_is_not_there_gets_one_sentence(monkeypatch):
    monkeypatch.setenv("TRAK_EXT_CUDA_PATH", "fast")
    with pytest.raises(ValueError, match=r"TRAK_EXT_CUDA_PATH: expected plain.*, got fast"):
        trak_ext.project(torch.ones(1, 8, device="cuda"), 4)


@device
def test_opcheck():
    grads = [torch.randn(3, 10, device="cuda"), torch.randn(3, 4, device="cuda").half()]
    law = ("rademacher", 5, 6, 7, 0, "high")
    torch.library.opcheck(operators.project, (grads, 16, *law))
    torch.library.opcheck(operators.project_, (grads, torch.zeros(3, 16, device="cuda"), *law))


@device
def test_devices_that_do_not_match_get_one_sentence():
    grads = torch.randn(3, 4, device="cuda")
    with pytest.raises(ValueError, match=r"out: expected a dense .* on cuda:0"):
        trak_ext.project(grads, 8, out=torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"grads\[0\]: expected a tensor on cpu as out is"):
        operators.project_([grads], torch.zeros(3, 8), "normal", 0, 0, 0, 0, "high")


def made_up_projection(rows: int, num_params: int, proj_dim: int) -> _C.Projection:
    return _C.Projection(
        matrix=operators.native_matrix("rademacher", 0, 0, 0, proj_dim, 1),
        grads=[
            _C.Gradient(
                address=0,
                dtype=1,
                params=num_params,
                row_stride=num_params,
                param_stride=1,
                param_offset=0,
            )
        ],
        rows=rows,
        proj_dim=proj_dim,
        out=_C.Output(address=0, row_stride=proj_dim, column_stride=1),
        precision=2,
    )


@built
def test_workspace_is_bounded():
    def size(
        rows: int, num_params: int, proj_dim: int, limit: int = operators.CUDA_WORKSPACE_BYTES
    ):
        return _C.cuda_workspace_bytes(made_up_projection(rows, num_params, proj_dim), limit)

    assert size(64, 10**12, 8192) == 256 * 2**20
    # Five chunks of 2048: sums, and eight rows in two bf16 parts.
    assert size(3, 10**4, 100) == 5 * (3 * 100 * 4 + 2048 * 8 * 2 * 2)
    # Sums [64, 512], and a chunk of 64 rows in two bf16 parts.
    assert size(64, 10**12, 8192, limit=0) == 64 * 512 * 4 + 64 * 512 * 64 * 2 * 2
    assert size(0, 5, 6) == size(4, 5, 0) == size(4, 0, 5) == 0
    assert size(2**40, 2**62, 2**32) == 256 * 2**20


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_an_error_and_no_result():
    grads, out = torch.ones(1, 8), torch.zeros(1, 4)
    matrix = operators.native_matrix("rademacher", 0, 0, 0, 4, 1)
    projection = operators.native_projection(matrix, [(grads, 0)], out, "high")
    space = {"workspace": out.data_ptr(), "workspace_bytes": 16}
    with pytest.raises(RuntimeError, match=r"^CUDA: ") as error:
        _C.cuda_project(projection, path="plain", **space, device=0, stream=0)
    assert "\n" not in str(error.value)
    rows = operators.matrix_rows(matrix, 0, out)
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        _C.cuda_fill_matrix(matrix, **rows, device=0, stream=0)
    assert (out == 0).all()


def test_other_devices_are_refused():
    grads = torch.randn(3, 4, device="meta")
    with pytest.raises(ValueError, match="device: expected a CPU or CUDA tensor, got"):
        trak_ext.projection_matrix(3, 4, device="meta")
    assert trak_ext.project(grads, 5).device.type == "meta"  # the shape, by the fake kernel
