"""Faults planted in copies of the sparse kind's CUDA source: running it on the host must tell."""

from __future__ import annotations

import shutil

import pytest
import torch

from cuda_host.builds import SOURCES, build_runner
from cuda_host.sjlt_library import SjltHostLibrary
from trak_ext import reference

# File, what stands there, what is put in its place, and what must be said; "" for a wrong result.
FAULTS = {
    "missing barrier": (
        "sjlt_sum_kernel.h",
        "make_rotations(problem, tile, lane, shared);\n  device::block_barrier();",
        "make_rotations(problem, tile, lane, shared);",
        "another thread|nobody wrote",
    ),
    "read past the end": (
        "sjlt_sum_kernel.h",
        "if (at >= static_cast<uint64_t>(problem.grad.params)) {",
        "if (at > static_cast<uint64_t>(problem.grad.params)) {",
        "global memory out of bounds|nobody wrote",
    ),
    "a part taken for a whole chunk": (
        "run_sjlt.h",
        "part.end_whole_chunk = end / width;",
        "part.end_whole_chunk = part.end_chunk;",
        "global memory out of bounds|nobody wrote",
    ),
    "a chunk left out": (
        "sjlt_sum_kernel.h",
        "begin + kUnroll <= end",
        "begin + kUnroll < end",
        "|global memory out of bounds|nobody wrote",
    ),
    "rows that do not exist": (
        "sjlt_sum_kernel.h",
        "first_row + row < problem.rows ? first_row + row : problem.rows - 1",
        "first_row + row",
        "global memory out of bounds",
    ),
    "wrong sign bit": ("sjlt_sum_kernel.h", "(31u - (bit & 31u))", "(30u - (bit & 30u))", ""),
    "no wrap": (
        "sjlt_sum_kernel.h",
        "wrapped ? found.bytes - wrap_bytes : found.bytes",
        "found.bytes + 0 * wrap_bytes",
        "|global memory out of bounds",
    ),
    "sums begin anew": ("sjlt_sum_kernel.h", "problem.go_on != 0 &&", "problem.go_on == 2 &&", ""),
    "a group too short": (
        "sjlt_fold_kernel.h",
        "? first + kSjltRadix : problem.end",
        "? first + 63 : problem.end",
        "",
    ),
    "another tree": (
        "sjlt_fold_kernel.h",
        "kSjltRadix - static_cast<int64_t>(number & (kSjltRadix - 1))",
        "problem.count + 0 * static_cast<int64_t>(number)",
        "",
    ),
    "open sums forgotten": ("sjlt_fold_kernel.h", "if (problem.begins == 0)", "if (false)", ""),
    "stale workspace": (
        "run_sjlt.h",
        "std::max(window_, plan_.nodes.first)",
        "window_",
        "",
    ),
    "no canonical NaN": (
        "sjlt_fold_kernel.h",
        "value == value ? value : law_from_bits(0x7FC00000u)",
        "value",
        "",
    ),
}


@pytest.fixture(scope="module")
def runner() -> list[str]:
    return build_runner()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def all_is_well(library: SjltHostLibrary) -> bool:
    """Return whether results are the oracle's: several rows, tensors, nodes, windows, levels."""
    generator = torch.Generator().manual_seed(0)
    for rows, sizes, proj_dim, workspace in (
        (3, (5000, 4000), 70, None),
        (1, (64 * 64 * 65 * 2,), 2, None),
        (2, (64 * 64 * 3 * 130,), 3, 256 * 74 * 4),
    ):
        grads = torch.randn(rows, sum(sizes), generator=generator)
        grads = grads * 10 ** (torch.rand(grads.shape, generator=generator) * 8 - 4)
        grads[0, 5:10000:3] = float("inf")
        law = {"param_offset": 64 * 70 + 3, "seed": 1}
        want = torch.from_numpy(reference.project_sjlt(grads.numpy(), proj_dim, **law))
        tensors = [part.clone() for part in grads.split(sizes, dim=1)]
        got = library.project(tensors, proj_dim, workspace_bytes=workspace, **law)
        if not same_bits(got, want):
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_planted_fault_is_found(name, tmp_path, runner):
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    said = None
    if name is not None:
        file, before, after, said = FAULTS[name]
        text = (sources / "cuda" / "projection" / file).read_text()
        assert text.count(before) >= 1
        (sources / "cuda" / "projection" / file).write_text(text.replace(before, after))
    library = SjltHostLibrary(tmp_path, sources, runner)
    if said is None:
        assert all_is_well(library)
        return
    well, error = False, ""
    try:
        well = all_is_well(library)
    except RuntimeError as found:
        error = str(found)
    assert not well
    assert any(part in error if part else error == "" for part in said.split("|"))
