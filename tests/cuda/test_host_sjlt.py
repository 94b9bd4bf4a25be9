"""The sparse kind's CUDA kernels, run on the host from their own source: the oracle's bits.

What a GPU would forgive is an error here: see cuda_host/device_host.h. The workspace is full of NaN
before every call.
"""

from __future__ import annotations

import pytest
import torch

from cuda_host.sjlt_library import SjltHostLibrary
from trak_ext import reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LEAST_WORKSPACE = 256 * 74 * 4


@pytest.fixture(scope="module")
def library() -> SjltHostLibrary:
    return SjltHostLibrary()


def wild(rows: int, num_params: int, seed: int = 0) -> torch.Tensor:
    """Return gradients whose sum shows its order: magnitudes over eight powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(rows, num_params, generator=generator) * 8 - 4
    return torch.randn(rows, num_params, generator=generator) * 10**exponents


def expected(grads: torch.Tensor, proj_dim: int, **law) -> torch.Tensor:
    values = grads.float() if grads.dtype == torch.bfloat16 else grads
    return torch.from_numpy(reference.project_sjlt(values.numpy(), proj_dim, **law))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def check(library: SjltHostLibrary, grads: torch.Tensor, proj_dim: int, **law) -> None:
    assert same_bits(library.project(grads, proj_dim, **law), expected(grads, proj_dim, **law))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 19])
def test_every_dtype_and_number_of_rows(library, dtype, rows):
    grads = wild(rows, 4000).clamp(-60000, 60000).to(dtype)
    check(library, grads, 60, nnz=2, seed=2**63 + 5, model_id=9)


@pytest.mark.parametrize(
    "proj_dim", [1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 192, 193, 255, 256, 257, 300, 511, 1025]
)
def test_columns_around_tile_borders(library, proj_dim):
    # One node and a half, or what there is of one.
    check(library, wild(2, min(96 * proj_dim + 5, 20000)), proj_dim, seed=3)


def test_every_width_of_a_tile_is_used(library):
    assert {library.tile_columns(width) for width in (1, 64, 100, 128, 300, 4096, 2**32)} == {
        64,
        128,
        256,
    }


@pytest.mark.parametrize("num_params", [1, 31, 32, 33, 127, 128, 129, 4095, 4096, 4097, 9001])
def test_params_around_borders(library, num_params):
    for param_offset in (0, 3, 127, 2000):
        check(library, wild(2, num_params), 70, param_offset=param_offset)


@pytest.mark.parametrize(
    "param_offset", [2**32 * 128 - 3, 2**40 + 13, 2**62, 2**63 - 5001, 64 * 64 * 35 * 3 - 9]
)
def test_offsets(library, param_offset):
    for proj_dim in (2, 70, 2048):
        check(library, wild(2, 5000), proj_dim, nnz=2, seed=1, param_offset=param_offset)


@pytest.mark.parametrize(("proj_dim", "num_params"), [(1, 70000), (5, 3 * 5 * 4096), (32, 2**18)])
def test_several_levels_of_the_tree(library, proj_dim, num_params):
    check(library, wild(1, num_params + 77), proj_dim, param_offset=4095)


@pytest.mark.parametrize("extra", [0, 4, 1000, 100000])
def test_windows_and_passes_make_no_difference(library, extra):
    # More nodes than the least workspace has slots, more rows and more columns than a pass.
    workspace = LEAST_WORKSPACE + extra
    for rows, num_params, proj_dim, nnz in ((11, 30000, 3, 1), (3, 20000, 600, 2), (2, 9000, 9, 9)):
        grads = wild(rows, num_params)
        law = {"nnz": nnz, "param_offset": 64 * 50 + 1, "workspace_bytes": workspace}
        got = library.project(grads, proj_dim, **law)
        del law["workspace_bytes"]
        assert same_bits(got, expected(grads, proj_dim, **law))


def test_open_sums_go_from_window_to_window(library):
    # Three levels above the nodes, of which a window has 64 or 128.
    grads = wild(2, 64 * 4096 + 64 * 700)
    want = expected(grads, 1, param_offset=64 * 100)
    for workspace in (LEAST_WORKSPACE, 2 * LEAST_WORKSPACE):
        got = library.project(grads, 1, param_offset=64 * 100, workspace_bytes=workspace)
        assert same_bits(got, want)


def test_too_small_a_workspace_gets_one_sentence(library):
    with pytest.raises(RuntimeError, match=r"workspace: expected at least \d+ bytes, got 100"):
        library.project(wild(1, 100), 4, workspace_bytes=100)


def test_the_workspace_is_bounded(library):
    def size(rows: int, num_params: int, proj_dim: int, limit: int = 2**28) -> int:
        from cuda_host.library import Gradient
        from cuda_host.sjlt_library import Problem, make_law

        views = (Gradient * 1)(Gradient(0, 1, num_params, num_params, 1, 0))
        problem = Problem(make_law(proj_dim, 1, 0, 0), views, 1, rows, 0, 0, 0)
        return library.workspace_bytes(problem, limit)

    assert size(64, 10**12, 8192) == 2**28
    assert size(8, 10**6, 4096) == 4 * 8 * 4096 * 4  # four nodes
    assert size(64, 10**12, 8192, limit=0) == LEAST_WORKSPACE
    assert size(0, 5, 6) == size(4, 0, 6) == size(4, 5, 0) == 0
    assert size(2**40, 2**62, 2**32) == 2**28


@pytest.mark.parametrize("sizes", [[1, 0, 5, 64, 129, 7000, 13, 0], [8999], [4480, 4480]])
def test_several_tensors_are_one_sum(library, sizes):
    grads = wild(9, 9000).bfloat16()
    parts = grads.split([*sizes, 9000 - sum(sizes)], dim=1)
    tensors = [part.to(DTYPES[i % 2]).clone() for i, part in enumerate(parts)]
    for proj_dim in (2, 70, 3000):
        want = expected(grads, proj_dim, nnz=2, param_offset=11)
        got = library.project(tensors, proj_dim, nnz=2, param_offset=11)
        assert same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(library, dtype):
    grads = wild(3, 2000).clamp(-60000, 60000).to(dtype)
    want = expected(grads, 70)
    assert same_bits(library.project(grads.T.contiguous().T, 70), want)
    wide = torch.full((3, 6000), 7.0, dtype=dtype)
    wide[:, 1::3] = grads
    assert same_bits(library.project(wide[:, 1::3], 70), want)
    odd = torch.empty(6001, dtype=dtype)[1:].view(3, 2000).copy_(grads)
    assert same_bits(library.project(odd, 70), want)


def test_out_is_added_to(library):
    grads, start = wild(3, 900), wild(3, 60, seed=1)
    want = torch.from_numpy(reference.project_sjlt(grads.numpy(), 60, out=start.numpy()))
    for out in (start.clone(), torch.zeros(60, 3).T, torch.zeros(3, 200)[:, 3:183:3]):
        out.copy_(start)
        assert same_bits(library.project(grads, 60, out=out), want)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_reaches_its_own_columns_alone(library, poison):
    grads = wild(5, 3000)
    clean = library.project(grads, 60, nnz=3)
    grads[2, 1234] = poison
    got = library.project(grads, 60, nnz=3)
    assert same_bits(got, expected(grads, 60, nnz=3))
    assert int((got != clean).sum()) == 3
    grads = torch.full((1, 2000), float("inf"))
    got = library.project(grads, 4)
    assert (got.view(torch.int32) == 0x7FC00000).all()


def test_denormals_are_kept(library):
    check(library, torch.randn(2, 5000) * 1e-40, 16)
    check(library, torch.randn(2, 500).double() * 1e-40, 16)


def test_nothing_to_do(library):
    for rows, num_params, proj_dim in ((0, 5, 6), (4, 0, 6), (4, 5, 0)):
        out = torch.ones(rows, proj_dim)
        library.project(torch.ones(rows, num_params), proj_dim, out=out)
        assert (out == 1).all()


@pytest.mark.parametrize("blocks_wanted", [0, 3, 10, 768])
def test_rows_a_block_make_no_difference(library, blocks_wanted):
    grads = wild(19, 3000)
    got = library.project(grads, 300, blocks_wanted=blocks_wanted, param_offset=5)
    assert same_bits(got, expected(grads, 300, param_offset=5))


@pytest.mark.parametrize("order_seed", [2, 3])
def test_the_order_of_blocks_and_threads_makes_no_difference(library, order_seed):
    grads = wild(9, 3000)
    law = {"nnz": 2, "seed": 7}
    got = library.project(grads, 20, order_seed=order_seed, **law)
    assert same_bits(got, expected(grads, 20, **law))


@pytest.mark.parametrize("param_offset", [0, 77, 2**63 - 301])
def test_matrix_kernels_are_the_law(library, param_offset):
    law = {"nnz": 3, "seed": 2**64 - 1, "model_id": 2, "param_offset": param_offset}
    for num_params, proj_dim in ((300, 3), (1, 300), (257, 33)):
        want = torch.from_numpy(
            reference.projection_matrix(num_params, proj_dim, kind="sjlt", **law)
        )
        assert same_bits(library.matrix(num_params, proj_dim, **law), want)
