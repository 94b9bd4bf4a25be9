"""The CUDA projection's kernels, run on the host from their own source, against the oracle.

What a GPU would forgive is an error here: see cuda_host/device_host.h.
"""

from __future__ import annotations

import pytest
import torch

from cuda_host.library import HostLibrary
from trak_ext import reference

KINDS = ["rademacher", "normal"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MATRIX_PRECISIONS = ["medium", "high", "highest"]
MATRIX_PRECISIONS += [f"warpgroup {precision}" for precision in MATRIX_PRECISIONS]
PRECISIONS = ["plain", *MATRIX_PRECISIONS]
CHUNK = 2048  # parameters of the shortest chunk

# Parts of the sum of |g| |R| that a result may be off: the split's and fp32's, doubled.
TOLERANCE = {"plain": 2**-21, "medium": 2**-7, "high": 2**-15, "highest": 2**-21}
TOLERANCE |= {f"warpgroup {name}": value for name, value in TOLERANCE.items()}


@pytest.fixture(scope="module")
def library() -> HostLibrary:
    return HostLibrary()


def matrix(num_params: int, proj_dim: int, **law) -> torch.Tensor:
    return torch.from_numpy(reference.projection_matrix(num_params, proj_dim, **law))


def integers(rows: int, num_params: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return integers that one bf16 part holds and whose sums are exact."""
    return torch.randint(-100, 101, (rows, num_params)).to(dtype)


def check(library: HostLibrary, grads: torch.Tensor, proj_dim: int, precision: str, **law) -> None:
    """Compare with fp64: to the bit where all is integer, else to the precision's tolerance."""
    exact_grads = grads.float().double()
    entries = matrix(grads.shape[1], proj_dim, **law).double()
    exact = exact_grads @ entries
    got = library.project(grads, proj_dim, precision=precision, **law).double()
    if law.get("kind") != "normal" and bool((exact_grads == exact_grads.round()).all()):
        assert torch.equal(got, exact)
    else:
        bound = TOLERANCE[precision] * (exact_grads.abs() @ entries.abs())
        assert ((got - exact).abs() <= bound + 1e-30).all()


def least_workspace(rows: int, precision: str) -> int:
    """Return bytes for sums [rows, 512] and a chunk of up to 64 rows in bf16 parts."""
    parts = {"plain": 0, "medium": 1, "high": 2, "highest": 3}[precision.split()[-1]]
    return 4 * 512 * min(rows, 64) + 2 * parts * CHUNK * 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_dtype_and_precision(library, kind, precision, dtype):
    for rows in (3, 13, 35):
        grads = integers(rows, 700, dtype)
        check(library, grads, 70, precision, kind=kind, seed=2**63 + 5, model_id=9)
        check(library, torch.randn(rows, 700).to(dtype), 70, precision, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_rows_around_tile_borders(library, kind, precision):
    for rows in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65):
        check(library, integers(rows, 130), 20, precision, kind=kind, param_offset=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_params_around_tile_borders(library, kind, precision):
    sizes = [1, 2, 4, 15, 16, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1023, 1025]
    sizes += [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1]
    for num_params in sizes:
        for param_offset in (0, 3, 509):
            check(
                library,
                integers(3, num_params),
                17,
                precision,
                kind=kind,
                param_offset=param_offset,
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_columns_around_tile_borders(library, kind, precision):
    for proj_dim in (1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513):
        check(library, integers(2, 300), proj_dim, precision, kind=kind, seed=3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_to_do(library, precision):
    for rows, num_params, proj_dim in ((0, 5, 6), (4, 0, 6), (4, 5, 0)):
        out = torch.ones(rows, proj_dim)
        library.project(torch.ones(rows, num_params), proj_dim, precision=precision, out=out)
        assert (out == 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("param_offset", [0, 100, 2**32 * 128 - 3, 2**40, 2**63 - 201])
def test_unit_vectors_read_the_matrix_back(library, kind, precision, param_offset):
    law = {"kind": kind, "seed": 3, "model_id": 2**32 - 1, "param_offset": param_offset}
    got = library.project(torch.eye(200), 50, precision=precision, **law)
    assert torch.equal(got, matrix(200, 50, **law))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("param_offset", [0, 77, 2**32 * 128 - 3, 2**63 - 301])
def test_matrix_kernel_is_the_law(library, kind, param_offset):
    law = {"kind": kind, "seed": 2**64 - 1, "param_offset": param_offset}
    for num_params, proj_dim in ((300, 1), (1, 300), (257, 33), (0, 4), (4, 0)):
        assert torch.equal(
            library.matrix(num_params, proj_dim, **law), matrix(num_params, proj_dim, **law)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_launch_shape_makes_no_difference(library, kind, precision):
    # Columns, rows and chunks that fit in a launch; tiles of other shapes; the order of threads;
    # how many blocks run at once.
    rows = 35 if precision != "plain" else 9
    grads = torch.randn(rows, 2 * CHUNK + 100)
    proj_dim = 530
    arguments = {"kind": kind, "precision": precision, "param_offset": 2**33 + 40}
    whole = library.project(grads, proj_dim, workspace_bytes=2**23, **arguments)
    smallest = least_workspace(rows, precision)
    for workspace_bytes in (smallest, 3 * smallest + 4):
        part = library.project(
            grads,
            proj_dim,
            workspace_bytes=workspace_bytes,
            order_seed=workspace_bytes,
            multiprocessors=workspace_bytes % 7 + 1,
            **arguments,
        )
        assert torch.equal(part, whole)
    for rows in (1, 9):
        for tile_for_rows, shared_limit in ((1, 0), (9, 0), (33, 99 * 1024), (33, 227 * 1024)):
            part = library.project(
                grads[:rows],
                40,
                tile_for_rows=tile_for_rows,
                shared_limit=shared_limit,
                **arguments,
            )
            assert torch.equal(part, whole[:rows, :40])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment_make_no_difference(library, kind, dtype):
    # Four elements at a time and single ones, at every misalignment there is.
    grads = torch.randn(10, 1100).to(dtype)
    expected = {}
    seen = set()
    for shift in range(9):
        for pitch in (1100, 1101, 1104):
            storage = torch.full((10 * pitch + shift,), float("nan"), dtype=dtype)
            same = storage[shift:].view(10, pitch)[:, :1100].copy_(grads)
            for param_offset in (0, 1, 2, 8):
                if (shift * 7 + pitch + param_offset) % 3 and shift > 1:
                    continue
                got = library.project(same, 33, kind=kind, param_offset=param_offset)
                assert torch.equal(got, expected.setdefault(param_offset, got))
                seen.add((same.data_ptr() - param_offset * same.element_size()) % 16)
    assert len(seen) >= 16 // grads.element_size()
    transposed = grads.T.contiguous().T
    spread = torch.stack([grads, torch.full_like(grads, float("nan"))], 2)[:, :, 0]
    for same in (transposed, spread):
        assert torch.equal(library.project(same, 33, kind=kind), expected[0])
    repeated = grads[:1].expand(10, 1100)
    assert torch.equal(library.project(repeated, 33, kind=kind), expected[0][:1].expand(10, 33))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_out_is_accumulated_into_whatever_its_strides(library, precision):
    grads = integers(6, 300)
    expected = 1 + library.project(grads, 21, precision=precision)
    for out in (
        torch.ones(6, 21),
        torch.ones(6, 50)[:, 3:24],
        torch.ones(12, 21)[::2],
        torch.ones(21, 6).T,
    ):
        library.project(grads, 21, precision=precision, out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_row(library, kind, precision, dtype):
    grads = torch.randn(20, 600).to(dtype)
    clean = library.project(grads, 50, kind=kind, precision=precision)
    exact = matrix(600, 50, kind=kind)
    others = [i for i in range(20) if i != 13]
    for poison in (float("nan"), float("inf"), -float("inf")):
        grads[13, 577] = poison
        got = library.project(grads, 50, kind=kind, precision=precision)
        assert torch.equal(got[others], clean[others])
        # An infinity meets its entry's sign, as in fp32; it does not decay to NaN.
        expected = (poison * exact[577]).float()
        assert torch.equal(got[13].nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("precision", MATRIX_PRECISIONS)
def test_a_nan_of_any_bits_stays_nan(library, precision):
    grads = torch.zeros(4, 32)
    payloads = [0x7F800001, 0x7FC00000, 0xFF80FFFF - 2**32, 0x7FFFFFFF]
    grads.view(torch.int32)[torch.arange(4), torch.arange(4)] = torch.tensor(
        payloads, dtype=torch.int64
    ).to(torch.int32)
    assert library.project(grads, 8, precision=precision).isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_floats_stay_finite(library, precision):
    largest = torch.finfo(torch.float32).max
    grads = torch.tensor([[largest], [-largest], [2.0**-126], [2.0**-149]])
    got = library.project(grads, 30, precision=precision)
    ratio = got.abs().double() / grads.abs().double()
    assert ((ratio - 1).abs() <= TOLERANCE[precision])[:2].all()
    assert got.isfinite().all()
    too_large = torch.tensor([[1e300]], dtype=torch.float64)
    assert library.project(too_large, 30, precision=precision).isinf().all()


@pytest.mark.parametrize("precision", ["highest", "warpgroup highest"])
def test_highest_holds_all_bits_of_fp32(library, precision):
    # One element an output: the three parts add up to it exactly.
    grads = torch.randn(8, 1) * torch.logspace(-25, 25, 8)[:, None]
    assert torch.equal(
        library.project(grads, 9, precision=precision).abs(), grads.abs().expand(8, 9)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_matrix_paths_agree_on_integers(library, kind):
    grads = integers(17, 1500)
    arguments = {"kind": kind, "param_offset": 2**35 + 300}
    expected = library.project(grads, 70, precision="high", **arguments)
    got = library.project(grads, 70, precision="warpgroup high", **arguments)
    if kind == "rademacher":
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("precision", ["plain", "high"])
def test_a_workspace_that_is_too_small_is_refused(library, precision):
    # Sums [3, 20], and a superblock of eight rows in two bf16 parts.
    least = 240 + (0 if precision == "plain" else 512 * 8 * 2 * 2)
    message = f"workspace: expected at least {least} bytes, got {least - 4}"
    library.project(torch.ones(3, 10), 20, precision=precision, workspace_bytes=least)
    with pytest.raises(RuntimeError, match=message):
        library.project(torch.ones(3, 10), 20, precision=precision, workspace_bytes=least - 4)


def test_a_path_is_found_by_its_name(library):
    paths = ["plain", "mma", "wgmma"]
    for i, best in enumerate(paths):
        for wanted in paths[: i + 1]:
            assert library.find_path(wanted, best) == wanted
    message = "path: expected plain or mma for this device and build, got wgmma"
    with pytest.raises(RuntimeError, match=message):
        library.find_path("wgmma", "mma")
    with pytest.raises(RuntimeError, match=r"expected plain, mma or wgmma for .*, got fast"):
        library.find_path("fast", "wgmma")
