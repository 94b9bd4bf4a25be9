"""Fragments and descriptors of the CUDA kernels against CuTe's layouts (bench/sass/layouts.py).

Every matrix instruction that the kernels issue, run on the host, is read as matrices by those
layouts. Operands then hold known numbers: which gradient or feature, of which row, is in which
place of the summed index, and that the other operand has what belongs there. Nothing of it comes
from the runner's own reading of registers and descriptors, which is checked by the way: a mistake
that kernels and runner share does not pass.
"""

from __future__ import annotations

import os
import re
import subprocess

import numpy as np
import pytest
import torch

from cuda_host.builds import SOURCES
from cuda_host.library import HostLibrary
from cuda_host.numbered import check_projection, digits, numbered, numbers_of
from cuda_host.scoring_library import ScoringLibrary
from cuda_host.witness import watch
from sass import layouts


@pytest.fixture(scope="module")
def library() -> HostLibrary:
    return HostLibrary()


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("path", ["", "warpgroup "])
@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_matrix_instructions_multiply_each_gradient_by_its_entries(
    library, kind, path, precision, rows
):
    check_projection(library, rows, path + precision, kind=kind, seed=rows)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("path", ["", "warpgroup "])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matrix_instructions_of_other_dtypes(library, kind, path, dtype):
    for rows in (5, 35):
        check_projection(library, rows, path + "high", dtype, kind=kind, param_offset=1024)


@pytest.mark.parametrize("path", ["", "warpgroup "])
@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_sums_of_what_is_no_integer(library, path, precision):
    with watch(library) as seen:
        library.project(torch.randn(33, 700), 70, precision=path + precision, kind="normal")
    assert seen


def check_scoring(library, num_train, targets, proj_dim, dtype, precision) -> None:
    """Every feature meets its own place of every target once."""
    runs = []
    for features, solved in zip(
        digits(numbered(num_train, proj_dim)), digits(numbered(targets, proj_dim)), strict=True
    ):
        with watch(library) as seen:
            got = library.score([features.to(dtype)], solved.float()[None], precision=precision)
        exact = features.double() @ solved.double().T
        torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=0)
        runs.append(seen)
    met = np.zeros((num_train, targets, proj_dim), dtype=np.int64)
    for low, high in zip(*runs, strict=True):
        a, b = numbers_of(low.a, high.a) - 1, numbers_of(low.b, high.b) - 1
        sample, feature = np.divmod(a, proj_dim)
        target, feature_of_target = np.divmod(b, proj_dim)
        both = (a >= 0)[:, None] & (b >= 0)  # [samples, targets, 16]
        same = feature[:, None] == feature_of_target
        assert same[both].all(), "a feature meets another one's place of a target"
        i, j, k = np.nonzero(both)
        np.add.at(met, (sample[i, k], target[j, k], feature[i, k]), 1)
    assert (met == 1).all()


@pytest.fixture(scope="module")
def scoring() -> ScoringLibrary:
    return ScoringLibrary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
@pytest.mark.parametrize("targets", [16, 21, 64])
def test_matrix_instructions_multiply_each_feature_by_its_targets(
    scoring, dtype, precision, targets
):
    check_scoring(scoring, 64, targets, 70, dtype, precision)


# --- What only a GPU runs: the device's own header -----------------------------------------------

DESCRIPTOR_PROBE = """
#include <cstdint>
#include <cstdio>
#define TRAK_EXT_DEVICE inline
struct { unsigned x; } threadIdx;
inline int __shfl_sync(unsigned, int value, int) { return value; }
inline uint64_t __cvta_generic_to_shared(const void* at) { return reinterpret_cast<uint64_t>(at); }
#include "warpgroup_cuda.h"
int main() {
  long address, leading, stride, bytes;
  while (std::scanf("%ld %ld %ld %ld", &address, &leading, &stride, &bytes) == 4) {
    const uint64_t operand = trak_ext::cuda::device::describe_operand(
        reinterpret_cast<void*>(address), static_cast<int>(leading), static_cast<int>(stride));
    const uint64_t moved = trak_ext::cuda::device::move_operand(operand, static_cast<int>(bytes));
    std::printf("%llu %llu\\n", static_cast<unsigned long long>(operand),
                static_cast<unsigned long long>(moved));
  }
}
"""


def described(folder, header: str, cases: list[tuple[int, int, int, int]]) -> list[list[int]]:
    """Return the descriptors of (address, leading, stride) and of `bytes` further on."""
    (folder / "warpgroup_cuda.h").write_text(header)
    (folder / "probe.cpp").write_text(DESCRIPTOR_PROBE)
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-w", f"-I{folder}"]
    command = [compiler, *flags, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    subprocess.run(command, check=True)
    lines = "".join(f"{a} {b} {c} {d}\n" for a, b, c, d in cases)
    found = subprocess.run([folder / "probe"], input=lines, capture_output=True, text=True)
    return [[int(word) for word in line.split()] for line in found.stdout.splitlines()]


def is_described_rightly(folder, header: str) -> bool:
    cases = [(1024, 128, 128, 256), (16, 1024, 128, 2048), (225 * 1024, 2048, 256, 16)]
    expected = [
        [
            layouts.Descriptor(address, leading, stride).bits(),
            layouts.Descriptor(address + further, leading, stride).bits(),
        ]
        for address, leading, stride, further in cases
    ]
    return described(folder, header, cases) == expected


def test_the_device_describes_operands_as_cute_does(tmp_path):
    header = (SOURCES / "cuda" / "device" / "warpgroup_cuda.h").read_text()
    assert is_described_rightly(tmp_path, header)
    for before, after in [
        ("summed_bytes >> 4) << 16", "row_bytes >> 4) << 16"),
        ("row_bytes >> 4) << 32", "row_bytes >> 4) << 33"),
        ("static_cast<uint64_t>(bytes >> 4)", "static_cast<uint64_t>(bytes >> 3)"),
    ]:
        assert header.count(before) == 1
        assert not is_described_rightly(tmp_path, header.replace(before, after)), before


def list_of(first: int, count: int) -> str:
    return "{" + ", ".join(f"%{first + i}" for i in range(count)) + "}"


def test_the_warpgroups_instruction_names_its_operands_in_order():
    # PTX ISA, wgmma.mma_async with A in registers: d, a, b's descriptor, scale-d, the signs of a
    # and b (1: as they are), and whether b is transposed (0: k runs along memory).
    text = (SOURCES / "cuda" / "device" / "warpgroup_cuda.h").read_text()
    blocks = re.findall(
        r"asm volatile\(\s*(\"\{ \.reg \.pred p; setp.*?)\"memory\"\);", text, re.DOTALL
    )
    rows_seen = set()
    for block in blocks:
        code, outputs, inputs, _ = re.split(r"\n\s*: ", block)
        rows = int(re.search(r"m64n(\d+)k16", code)[1])
        rows_seen.add(rows)
        sums = rows // 2
        normal = re.sub(r"\s+", " ", "".join(re.findall(r'"(.*?)"', code)))
        assert f"setp.ne.s32 p, %{sums + 5}, 0;" in normal
        expected = f"{list_of(0, sums)}, {list_of(sums, 4)}, %{sums + 4}, p, 1, 1, 0; }}"
        assert "f32.bf16.bf16 " + expected in normal
        assert re.findall(r"TRAK_EXT_D4\(d, (\d+)\)", outputs) == [str(i) for i in range(rows // 8)]
        assert re.findall(r'"(.)"\(([^)]*)\)', inputs) == [
            *(("r", f"a[{i}]") for i in range(4)),
            ("l", "b"),
            ("r", "add"),
        ]
    assert rows_seen >= {8, 16, 32, 64}
    assert re.search(
        r"define TRAK_EXT_D4\(d, i\) " + ", ".join(rf'"\+f"\(d\[i\]\[{i}\]\)' for i in range(4)),
        text,
    )


def test_the_warps_instruction_names_its_operands_in_order():
    text = (SOURCES / "cuda" / "device" / "device_cuda.h").read_text()
    found = re.search(r"mma\.sync\.aligned\.m16n8k16.*?\);", text, re.DOTALL)
    assert found is not None
    assert "row.col.f32.bf16.bf16.f32" in found[0]
    normal = re.sub(r"[\s\"]+", "", found[0])
    assert "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" in normal
    operands = re.findall(r"\+?([fr])\(([\w\[\]]+)\)", normal)
    assert operands == [
        *(("f", f"d[{i}]") for i in range(4)),
        *(("r", f"a[{i}]") for i in range(4)),
        ("r", "b0"),
        ("r", "b1"),
    ]
    # cvt's first source goes to the upper half.
    packs = re.findall(r"cvt\.r.\.bf16x2\.f32 %0, %1, %2;\" : \"=r\"\(packed\) : (.*)\);", text)
    assert packs == ['"f"(upper), "f"(lower)'] * 2


def test_the_layouts_are_those_of_the_ptx_isa():
    # The same facts a second time, as the PTX ISA words them for each thread and element.
    for thread in range(32):
        g, t = thread // 4, thread % 4
        for i in range(8):
            row, k = g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)
            assert layouts.WARP_A.offsets()[thread, i] == row + 16 * k
        for i in range(4):
            k = 2 * t + i % 2 + 8 * (i // 2)
            assert layouts.WARP_B.offsets()[thread, i] == g + 8 * k
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            assert layouts.WARP_C.offsets()[thread, i] == row + 16 * column
    for thread in range(128):
        lane, warp = thread % 32, thread // 32
        for i in range(32):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
            assert layouts.warpgroup_c(64).offsets()[thread, i] == row + 64 * column
            if i < 8:
                assert layouts.WARPGROUP_A.offsets()[thread, i] == row + 64 * column
