"""The sparse kind: features are those of the oracle to the bit, however the work is cut."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak_ext
from trak_ext import reference
from trak_ext.kernels import operators

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def wild(rows: int, num_params: int, seed: int = 0) -> torch.Tensor:
    """Return gradients whose sum shows its order: magnitudes over eight powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(rows, num_params, generator=generator) * 8 - 4
    return torch.randn(rows, num_params, generator=generator) * 10**exponents


def expected(grads: torch.Tensor, proj_dim: int, **law) -> torch.Tensor:
    # NumPy has no bf16; fp32 holds it exactly.
    values = grads.float() if grads.dtype == torch.bfloat16 else grads
    return torch.from_numpy(reference.project_sjlt(values.numpy(), proj_dim, **law))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def project(grads, proj_dim: int, **options) -> torch.Tensor:
    return trak_ext.project(grads, proj_dim, kind="sjlt", **options)


@pytest.mark.parametrize("nnz", [1, 2, 4])
@pytest.mark.parametrize("proj_dim", [4, 12, 60, 128, 260, 1024, 5000])
def test_features_are_those_of_the_oracle(proj_dim, nnz):
    law = {"seed": 2**63 + 5, "model_id": 9, "nnz": nnz}
    for num_params in (1, 100, 20000):
        grads = wild(3, num_params)
        assert same_bits(project(grads, proj_dim, **law), expected(grads, proj_dim, **law))


@pytest.mark.parametrize("proj_dim", [1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129])
def test_narrow_outputs(proj_dim):
    # Three levels of the tree where there is one column.
    grads = wild(2, 3 * 64 * 64 * 2 + 77)
    law = {"seed": 3, "param_offset": 64 * 64 - 5}
    assert same_bits(project(grads, proj_dim, **law), expected(grads, proj_dim, **law))
    law["nnz"] = proj_dim
    assert same_bits(
        project(grads[:, :50], proj_dim, **law), expected(grads[:, :50], proj_dim, **law)
    )


@pytest.mark.parametrize("proj_dim", [128, 144, 257, 4096, 4097, 8200, 13000])
def test_chunks_that_are_read_where_they_lie(proj_dim):
    # Two whole groups of eight chunks and pieces before and after; several panels of columns.
    grads = wild(3, 25 * proj_dim + 5)
    law = {"seed": 6, "param_offset": 47 * proj_dim - 3}
    assert same_bits(project(grads, proj_dim, **law), expected(grads, proj_dim, **law))
    wide = torch.full((3, 26 * proj_dim), 7.0)
    wide[:, 11 : 11 + grads.shape[1]] = grads
    view = wide[:, 11 : 11 + grads.shape[1]]
    assert same_bits(project(view, proj_dim, **law), expected(grads, proj_dim, **law))


@pytest.mark.parametrize(
    "param_offset", [0, 1, 77, 64 * 30 - 1, 2**32 * 128 - 3, 2**40 + 13, 2**62, 2**63 - 5001]
)
def test_offsets(param_offset):
    grads = wild(2, 5000)
    law = {"param_offset": param_offset, "nnz": 2, "seed": 1}
    for proj_dim in (2, 60, 2048):
        assert same_bits(project(grads, proj_dim, **law), expected(grads, proj_dim, **law))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype):
    grads = wild(5, 7001).clamp(-60000, 60000).to(dtype)
    want = expected(grads, 96, nnz=3)
    assert same_bits(project(grads, 96, nnz=3), want)
    assert same_bits(project(grads.T.contiguous().T, 96, nnz=3), want)
    wide = torch.full((5, 3 * 7001), 7.0, dtype=dtype)
    wide[:, 1::3] = grads
    assert same_bits(project(wide[:, 1::3], 96, nnz=3), want)
    odd = torch.empty(5 * 7001 + 1, dtype=dtype)[1:].view(5, 7001).copy_(grads)
    assert same_bits(project(odd, 96, nnz=3), want)
    backwards = grads.flip(0)
    assert same_bits(project(backwards, 96, nnz=3).flip(0), want)
    assert same_bits(project(grads[:1].expand(4, -1), 96, nnz=3), want[:1].expand(4, -1))


def test_fp64_is_rounded_first():
    grads = torch.tensor([[1 + 2**-24 + 2**-40, 2**-149 * 0.75, 1e300, -1e300, 2.0**-140]]).double()
    assert same_bits(project(grads, 8), expected(grads, 8))


def test_a_mapping_is_one_sum():
    # Borders inside chunks, inside nodes, empty tensors, different dtypes.
    grads = wild(3, 40000).bfloat16()
    for proj_dim in (6, 100, 3000):
        want = expected(grads, proj_dim, nnz=2, param_offset=11)
        sizes = [1, 0, 5, 64, 129, 7000, 13, 0, 40000 - 7212]
        parts = dict(enumerate(grads.split(sizes, dim=1)))
        named = {str(i): part.to(DTYPES[i % 2]) for i, part in parts.items()}
        assert same_bits(project(named, proj_dim, nnz=2, param_offset=11), want)


def with_gaps(grads: torch.Tensor, places: list[tuple[int, int]], proj_dim: int, **law):
    """Return features of pieces of gradients, and of those with zeros everywhere else."""
    zeros = torch.zeros_like(grads)
    for begin, end in places:
        zeros[:, begin:end] = grads[:, begin:end]
    offset = law.get("param_offset", 0)
    out = torch.zeros(len(grads), proj_dim)
    seed = law.get("seed", 0)
    operators.project_placed(
        [(grads[:, begin:end], offset + begin) for begin, end in places],
        out, "sjlt", seed, 0, law.get("model_id", 0), "highest", law.get("nnz", 1),
    )  # fmt: skip
    return out, project(zeros, proj_dim, **law)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_dim", [1, 6, 63, 64, 100, 128, 2048, 4100])
def test_gaps_are_zeros(proj_dim, dtype):
    # Rows of an embedding, some of them neighbours, between dense tensors; a gap of whole nodes.
    grads = wild(5, 300_000).clamp(-60000, 60000).to(dtype)
    rows = sorted({*range(40, 44), *range(90, 700, 37), 1500})
    places = [(0, 77), (77, 100), *((100 + 96 * row, 196 + 96 * row) for row in rows)]
    places += [(290_000, 290_000), (290_001, 299_000), (299_003, 300_000)]
    for offset in (0, 64 * proj_dim - 3):
        law = {"param_offset": offset, "nnz": 2 if proj_dim % 2 == 0 else 1, "seed": 5}
        found, want = with_gaps(grads, places, proj_dim, **law)
        assert same_bits(found, want)
        turned, _ = with_gaps(grads.T.contiguous().T, places, proj_dim, **law)
        assert same_bits(turned, want)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 9])
def test_gaps_whatever_the_threads(threads, rows):
    grads = wild(rows, 2**20)
    places = [(i, i + 300) for i in range(5, 2**20 - 300, 700)]
    for proj_dim in (40, 8192):
        trak_ext.set_num_threads(threads)
        found, want = with_gaps(grads, places, proj_dim, param_offset=2**40 + 1)
        trak_ext.set_num_threads(None)
        assert same_bits(found, want)


@given(
    data=st.data(),
    rows=st.integers(1, 4),
    proj_dim=st.integers(1, 300),
    offset=st.integers(0, 2**42),
)
@settings(max_examples=60, deadline=None)
def test_any_gaps(data, rows, proj_dim, offset):
    borders = sorted(data.draw(st.lists(st.integers(0, 30_000), min_size=2, max_size=24)))
    grads = wild(rows, 30_000)
    places = list(zip(borders[::2], borders[1::2], strict=False))
    found, want = with_gaps(grads, places, proj_dim, param_offset=offset)
    assert same_bits(found, want)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("rows", "proj_dim", "nnz"), [(1, 8, 1), (1, 64, 1), (9, 2048, 2), (33, 40, 4)]
)
def test_threads_make_no_difference(threads, rows, proj_dim, nnz):
    grads = wild(rows, 2**19 // rows + 3)
    trak_ext.set_num_threads(1)
    alone = project(grads, proj_dim, nnz=nnz, param_offset=999)
    trak_ext.set_num_threads(threads)
    assert same_bits(project(grads, proj_dim, nnz=nnz, param_offset=999), alone)
    assert same_bits(project(grads[:1], proj_dim, nnz=nnz, param_offset=999), alone[:1])
    trak_ext.set_num_threads(None)


def test_out_is_added_to():
    grads = wild(4, 3000)
    start = wild(4, 60, seed=1)
    want = torch.from_numpy(reference.project_sjlt(grads.numpy(), 60, nnz=2, out=start.numpy()))
    for out in (start.clone(), start.T.contiguous().T, torch.zeros(4, 200)[:, 3:183:3]):
        out.copy_(start)
        assert project(grads, 60, nnz=2, out=out) is out
        assert same_bits(out, want)


def test_zero_sizes():
    for rows, num_params, proj_dim in ((0, 5, 6), (4, 0, 6), (4, 5, 0)):
        out = torch.full((rows, proj_dim), -0.0)
        project(torch.ones(rows, num_params), proj_dim, out=out)
        assert same_bits(out, torch.full((rows, proj_dim), -0.0))
    assert trak_ext.projection_matrix(5, 0, kind="sjlt").shape == (5, 0)
    assert trak_ext.projection_matrix(0, 6, kind="sjlt", nnz=3).shape == (0, 6)


@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_poison_reaches_its_own_columns_alone(poison):
    grads = wild(5, 3000)
    clean = project(grads, 60, nnz=3)
    grads[2, 1234] = poison
    got = project(grads, 60, nnz=3)
    columns = trak_ext.projection_matrix(3000, 60, kind="sjlt", nnz=3)[1234] != 0
    assert int(columns.sum()) == 3
    touched = torch.zeros(5, 60, dtype=torch.bool)
    touched[2] = columns
    assert same_bits(got[~touched], clean[~touched])
    assert not got[touched].isfinite().any()
    assert same_bits(got, expected(grads, 60, nnz=3))


def test_nan_is_one_nan():
    # Inf - Inf makes a NaN of another sign on every processor, and payloads travel.
    grads = torch.full((1, 4000), float("inf"))
    grads[0, 7] = torch.tensor([0x7FA12345], dtype=torch.int32).view(torch.float32)
    got = project(grads, 4)
    assert same_bits(got, torch.tensor([[0x7FC00000] * 4], dtype=torch.int32).view(torch.float32))
    out = torch.tensor([[-0x123]], dtype=torch.int32).view(torch.float32)
    project(torch.ones(1, 3), 1, out=out)
    assert out.view(torch.int32).item() == 0x7FC00000


@pytest.mark.parametrize("threads", [1, 3])
def test_denormals_are_kept_whatever_torch_does(threads):
    grads = torch.randn(8, 50000) * 1e-40
    want = expected(grads, 16)
    trak_ext.set_num_threads(threads)
    assert torch.set_flush_denormal(True)
    try:
        got = project(grads, 16)
        assert (torch.tensor([1e-40]) * 1).item() == 0  # still flushing outside
    finally:
        torch.set_flush_denormal(False)
        trak_ext.set_num_threads(None)
    assert same_bits(got, want)


def test_the_matrix_is_what_projects():
    law = {"kind": "sjlt", "nnz": 2, "seed": 4, "model_id": 7, "param_offset": 100}
    matrix = trak_ext.projection_matrix(300, 50, **law)
    assert torch.equal(matrix, torch.from_numpy(reference.projection_matrix(300, 50, **law)))
    assert ((matrix != 0).sum(1) == 2).all()
    assert torch.equal(trak_ext.project(torch.eye(300), 50, **law), matrix)
    scale = torch.tensor(25.0).sqrt()
    assert torch.equal(matrix.abs().unique(), torch.stack([torch.tensor(0.0), scale]))


WRONG = [
    ({"nnz": 3}, ValueError, "nnz: expected a positive divisor of proj_dim = 8 .*, got 3"),
    ({"nnz": 16}, ValueError, "nnz: expected a positive divisor of proj_dim = 8 .*, got 16"),
    ({"nnz": 0}, ValueError, "nnz: expected an integer from 1 to .*, got 0"),
    ({"nnz": 2.0}, TypeError, "nnz: expected an integer, got 2.0"),
    ({"nnz": 2, "kind": "normal"}, ValueError, "nnz: expected 1 with kind 'normal'.*, got 2"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_nnz_gets_one_sentence(options, error, message):
    options = {"kind": "sjlt", **options}
    calls = [
        lambda: trak_ext.project(torch.ones(1, 5), 8, **options),
        lambda: trak_ext.projection_matrix(5, 8, **options),
        lambda: trak_ext.Projector(5, 8, **options),
    ]
    for call in calls:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_projector():
    grads = wild(3, 500)
    projector = trak_ext.Projector(500, 40, kind="sjlt", seed=5, nnz=2)
    want = project(grads, 40, seed=5, nnz=2, model_id=6)
    assert same_bits(projector.project(grads, model_id=6), want)


def test_a_parameter_counts_from_the_matrix_not_the_call():
    grads = wild(2, 9000).double()
    parts = project(grads[:, :3100], 64) + project(grads[:, 3100:], 64, param_offset=3100)
    torch.testing.assert_close(parts, project(grads, 64), rtol=1e-4, atol=1.0)
    whole = np.asarray(trak_ext.projection_matrix(9000, 64, kind="sjlt"))
    later = np.asarray(trak_ext.projection_matrix(50, 64, kind="sjlt", param_offset=3100))
    assert np.array_equal(whole[3100:3150], later)


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs mmap as POSIX has it")
@pytest.mark.parametrize("proj_dim", [1, 48, 100, 130, 1000, 5000])
def test_nothing_is_read_outside_the_gradients(proj_dim):
    # Between two pages that may not be touched: the end at the one, or the beginning at the other.
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    num_params = 17 * proj_dim + 3
    pages = (4 * num_params + page - 1) // page
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    for offset in (page, (pages + 1) * page - 4 * num_params):
        grads = torch.frombuffer(memory, dtype=torch.float32, count=num_params, offset=offset)
        grads.copy_(torch.randn(num_params))
        assert same_bits(project(grads[None], proj_dim), expected(grads[None], proj_dim))
    for guard in (start, start + (pages + 1) * page):
        libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 3)
