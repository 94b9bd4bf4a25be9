"""The sparse kind on a CUDA device: the CPU's bits. Skipped where there is no device."""

from __future__ import annotations

import pytest
import torch

import trak_ext
from cuda_device import built, device
from trak_ext import _C
from trak_ext.kernels import operators

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def wild(rows: int, num_params: int) -> torch.Tensor:
    """Return gradients whose sum shows its order: magnitudes over eight powers of ten."""
    return torch.randn(rows, num_params) * 10 ** (torch.rand(rows, num_params) * 8 - 4)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.int32), b.cpu().view(torch.int32))


def project(grads, proj_dim: int, **options) -> torch.Tensor:
    return trak_ext.project(grads, proj_dim, kind="sjlt", **options)


@device
@pytest.mark.parametrize("param_offset", [0, 77, 2**39 - 5, 2**63 - 1001])
def test_matrix_is_that_of_the_cpu(param_offset):
    law = {"kind": "sjlt", "nnz": 3, "seed": 2**63 + 5, "model_id": 9}
    law["param_offset"] = param_offset
    got = trak_ext.projection_matrix(1000, 300, device="cuda", **law)
    assert torch.equal(got.cpu(), trak_ext.projection_matrix(1000, 300, **law))


@device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1, 1), (3, 5000, 70), (9, 70001, 512), (67, 300001, 600), (5, 2**20, 4)),
        *((33, 2**20 + 3, 4096), (2, 2**23 + 1, 64), (1, 3 * 2**20, 1)),
    ],
)
def test_features_are_those_of_the_cpu(dtype, shape):
    rows, num_params, proj_dim = shape
    grads = wild(rows, num_params).clamp(-60000, 60000).to(dtype)
    for nnz in {1, 2 if proj_dim % 2 == 0 else 1}:
        law = {"seed": 4, "model_id": 2, "param_offset": 4099, "nnz": nnz}
        assert same_bits(project(grads.cuda(), proj_dim, **law), project(grads, proj_dim, **law))


@device
def test_batch_strides_and_workspace_make_no_difference(monkeypatch):
    grads = wild(70, 500001).cuda()
    whole = project(grads, 600)
    for rows in (1, 2, 8, 9, 16, 17, 31, 33):
        assert same_bits(project(grads[3 : 3 + rows], 600), whole[3 : 3 + rows])
    shifted = torch.empty(grads.numel() + 1, device="cuda")[1:].view_as(grads).copy_(grads)
    for same in (grads, grads.T.contiguous().T, shifted):
        assert same_bits(project(same, 600), whole)
    for size in (0, 2**20, 2**24):
        monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", size)
        assert same_bits(project(grads, 600), whole)


@device
def test_a_mapping_out_and_zero_sizes():
    grads = wild(9, 90000)
    want = project(grads, 300, out=torch.ones(9, 300))
    sizes = [1, 0, 5, 64, 129, 70000, 13, 0, 90000 - 70212]
    named = {str(i): part.cuda() for i, part in enumerate(grads.split(sizes, dim=1))}
    for out in (torch.ones(9, 400, device="cuda")[:, 3:303], torch.ones(300, 9, device="cuda").T):
        assert project(named, 300, out=out) is out
        assert same_bits(out, want)
    for rows, num_params, proj_dim in ((0, 5, 6), (4, 0, 6), (4, 5, 0)):
        got = project(torch.ones(rows, num_params, device="cuda"), proj_dim)
        assert torch.equal(got, torch.zeros(rows, proj_dim, device="cuda"))


@device
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_denormals_and_nan_are_those_of_the_cpu(poison):
    grads = wild(20, 3000)
    grads[13, 777] = poison
    assert same_bits(project(grads.cuda(), 60, nnz=2), project(grads, 60, nnz=2))
    tiny = torch.randn(2, 50000) * 1e-40
    assert same_bits(project(tiny.cuda(), 16), project(tiny, 16))
    infinite = torch.full((1, 4000), float("inf"))
    assert same_bits(project(infinite.cuda(), 4), project(infinite, 4))


@device
def test_more_than_2_to_31_elements():
    grads = torch.zeros(2, 2**31 + 70000, dtype=torch.bfloat16, device="cuda")
    grads[:, 2**31 - 5 : 2**31 + 69000] = 1
    tail = grads[:, 2**31 - 5 :].cpu()
    # Zeros change no sum, so only the tree's upper levels differ from those of a short call.
    got, want = project(grads, 2048), project(tail, 2048, param_offset=2**31 - 5)
    assert same_bits(got, want)


@device
def test_the_callers_stream_and_graphs():
    grads = torch.randn(5, 300000, device="cuda")
    expected = project(grads, 256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = project(grads * 2, 256)
    stream.synchronize()
    assert torch.equal(got, 2 * expected)
    static = torch.zeros_like(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = project(static, 256)
    static.copy_(grads)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, expected)


@device
def test_opcheck():
    grads = [torch.randn(3, 10, device="cuda"), torch.randn(3, 4, device="cuda").half()]
    law = ("sjlt", 5, 6, 7, 0, "high", 4)
    torch.library.opcheck(operators.project, (grads, 16, *law))
    torch.library.opcheck(operators.project_, (grads, torch.zeros(3, 16, device="cuda"), *law))


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_an_error_and_no_result():
    grads, out = torch.ones(1, 8), torch.zeros(1, 4)
    matrix = operators.native_matrix("sjlt", 0, 0, 0, 4, 1)
    projection = operators.native_projection(matrix, [(grads, 0)], out, "high")
    size = _C.cuda_workspace_bytes(projection, 2**20)
    workspace = torch.zeros(size // 4)
    space = {"workspace": workspace.data_ptr(), "workspace_bytes": size}
    with pytest.raises(RuntimeError, match=r"^CUDA: ") as error:
        _C.cuda_project(projection, full_blocks=False, **space, device=0, stream=0)
    assert "\n" not in str(error.value)
    rows = operators.matrix_rows(matrix, 0, out)
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        _C.cuda_fill_matrix(matrix, **rows, device=0, stream=0)
    assert (out == 0).all()
