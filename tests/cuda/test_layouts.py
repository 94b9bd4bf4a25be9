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
import shutil
import subprocess

import numpy as np
import pytest
import torch

from cuda_host.builds import HOST, SOURCES, build_runner
from cuda_host.library import HostLibrary
from cuda_host.scoring_library import ScoringLibrary
from cuda_host.witness import Instruction, watch
from sass import layouts
from trak_ext import reference

PARAMS = 512  # whole stages: every place of the summed index is used
BASE = 256  # integers below it are bf16 numbers


def numbered(rows: int, columns: int) -> torch.Tensor:
    """Return a number for each element, from 1 on."""
    assert rows * columns < BASE * BASE
    return torch.arange(1, rows * columns + 1).view(rows, columns)


def digits(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Return two numbers that one bf16 part holds, for each."""
    return [numbers % BASE, numbers // BASE]


def numbers_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low + BASE * high).astype(np.int64)


def instructions(library, rows, proj_dim, precision, dtype, **law) -> list[tuple[np.ndarray, ...]]:
    """Return (a, numbers of b) of every instruction that has gradients in it."""
    runs: list[list[Instruction]] = []
    for grads in digits(numbered(rows, PARAMS)):
        with watch(library) as seen:
            library.project(grads.to(dtype), proj_dim, precision=precision, **law)
        runs.append(seen)
    result = []
    for low, high in zip(*runs, strict=True):
        assert np.array_equal(low.a, high.a)
        numbers = numbers_of(low.b, high.b)
        if numbers.any():  # the parts after the first are zero
            result.append((low.a, numbers))
    return result


def check_projection(library, rows, precision, dtype=torch.float32, proj_dim=20, **law) -> None:
    """Every gradient meets every column once, and in its place the column's entry for it."""
    found = instructions(library, rows, proj_dim, precision, dtype, **law)
    numbers = np.stack([b for _, b in found]) - 1  # [instructions, rows of the tile, 16]
    row, param = np.divmod(numbers, PARAMS)
    live = numbers >= 0
    places = live.any(axis=1)
    assert places.all(), "a place of the summed index without gradients"
    params = np.where(live, param, 0).max(axis=1)  # [instructions, 16]
    assert (param == params[:, None])[live].all(), "a place has gradients of several parameters"
    shift = row - np.arange(row.shape[1])[:, None]
    first = np.where(live, shift, 0).max(axis=(1, 2))
    assert (shift == first[:, None, None])[live].all(), "rows are not in order"
    # Which columns an instruction's rows of `a` are, by their entries.
    a = np.stack([a for a, _ in found])
    entries = reference.projection_matrix(PARAMS, 512, **law).astype(np.float64)[params]
    distance = (a**2).sum(axis=2)[:, :, None] + (entries**2).sum(axis=1)[:, None] - 2 * a @ entries
    is_column = distance < 1e-9  # [instructions, rows of a, columns]
    assert is_column.any(axis=2).all(), "entries that are not those of the gradients beside them"
    met = np.zeros((rows, PARAMS, proj_dim), dtype=np.int64)
    for i in range(len(found)):
        columns = is_column[i, :, :proj_dim].sum(axis=0)
        np.add.at(met, (row[i][live[i]], param[i][live[i]]), columns)
    if law["kind"] == "normal":
        assert (met == 1).all()
    else:  # of 16 signs a stranger has the same, now and then
        assert met.min() == 1
        assert met.mean() < 1.1


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


# Faults of the kernels, and faults that they share with the runner that plays them, so that results
# are right and no other test can tell. Path, then file under csrc/cuda or the helpers' cuda_host,
# what stands there and what is put in its place, and what is said.
DESCRIBED = "kHalfBytes,\n                                    kCoreBytes);"
NOT_BESIDE = "entries that are not those of the gradients beside them"
KERNEL_FAULTS = {
    "halves of a register": (
        "mma",
        [
            ("csrc/cuda/entries.h", "return {lower, lower + 16};", "return {lower + 16, lower};"),
        ],
        NOT_BESIDE,
    ),
    "order of registers": (
        "mma",
        [
            (
                "csrc/cuda/entries.h",
                "a[2 + i] = pair_of_signs(word);",
                "a[3 - i] = pair_of_signs(word);",
            ),
        ],
        NOT_BESIDE,
    ),
    "leading offset": (
        "warpgroup",
        [("csrc/cuda/operand_ring.h", DESCRIBED, "kCoreBytes, kCoreBytes);")],
        "gradients of several parameters|rows are not in order|" + NOT_BESIDE,
    ),
    "rows of a core matrix": (
        "warpgroup",
        [("csrc/cuda/split_gradients_kernel.h", "+ row * 16;", "+ (row ^ 1) * 16;")],
        "rows are not in order",
    ),
}
SHARED_FAULTS = {
    "leading and stride offsets exchanged": (
        "warpgroup",
        [
            ("csrc/cuda/operand_ring.h", DESCRIBED, "kCoreBytes, kHalfBytes);"),
            (
                "host/warpgroup.cpp",
                "k / 8 * summed_bytes + n / 8 * row_bytes",
                "k / 8 * row_bytes + n / 8 * summed_bytes",
            ),
        ],
        "sums at",
    ),
    "descriptor fields in each other's bits": (
        "warpgroup",
        [
            (
                "host/warpgroup.cpp",
                "static_cast<uint64_t>(summed_bytes >> 4) << 16 |\n"
                "         static_cast<uint64_t>(row_bytes >> 4) << 32",
                "static_cast<uint64_t>(summed_bytes >> 4) << 32 |\n"
                "         static_cast<uint64_t>(row_bytes >> 4) << 16",
            ),
            (
                "host/warpgroup.cpp",
                "summed_bytes = field(operand, 16), row_bytes = field(operand, 32)",
                "summed_bytes = field(operand, 32), row_bytes = field(operand, 16)",
            ),
        ],
        "sums at",
    ),
    "halves of the second operand's registers swapped": (
        "mma",
        [
            ("csrc/cuda/entries.h", "return {lower, lower + 16};", "return {lower + 16, lower};"),
            (
                "host/runner.cpp",
                "b[2 * t + half][g] = from_bf16(fiber.b[0] >> (16 * half));",
                "b[2 * t + half][g] = from_bf16(fiber.b[0] >> (16 * (1 - half)));",
            ),
            (
                "host/runner.cpp",
                "b[2 * t + 8 + half][g] = from_bf16(fiber.b[1] >> (16 * half));",
                "b[2 * t + 8 + half][g] = from_bf16(fiber.b[1] >> (16 * (1 - half)));",
            ),
        ],
        "sums at",
    ),
    "registers of the first operand in another order": (
        "warpgroup",
        [
            (
                "csrc/cuda/entries.h",
                "a[i] = pair_of_signs(word);",
                "a[2 * i] = pair_of_signs(word);",
            ),
            (
                "csrc/cuda/entries.h",
                "a[2 + i] = pair_of_signs(word);",
                "a[2 * i + 1] = pair_of_signs(word);",
            ),
            ("host/warpgroup.cpp", "row + i / 2 % 2 * 8) * 16", "row + i / 4 * 8) * 16"),
            ("host/warpgroup.cpp", "2 * slot + i / 4 * 8", "2 * slot + i / 2 % 2 * 8"),
        ],
        "sums at",
    ),
    "rows of the sums exchanged": (
        "mma",
        [
            ("csrc/cuda/block_tile.h", "lane % 4 * 2 + i;", "lane % 4 + 4 * i;"),
            (
                "host/runner.cpp",
                "d[g][2 * t + half] = fiber.d[half];\n      d[g + 8][2 * t + half]",
                "d[g][t + 4 * half] = fiber.d[half];\n      d[g + 8][t + 4 * half]",
            ),
            (
                "host/runner.cpp",
                "truncate(sums[g][2 * t + half]);\n"
                "      fiber.d[2 + half] = truncate(sums[g + 8][2 * t + half]);",
                "truncate(sums[g][t + 4 * half]);\n"
                "      fiber.d[2 + half] = truncate(sums[g + 8][t + 4 * half]);",
            ),
        ],
        "sums at",
    ),
}


def build_faulty(folder, path: str, changes: list[tuple[str, str, str]]) -> HostLibrary:
    """Build kernels and runner from copies with changes in them."""
    shutil.copytree(SOURCES, folder / "csrc")
    shutil.copytree(HOST, folder / "host")
    for name, before, after in changes:
        file = folder / name
        text = file.read_text()
        assert text.count(before) == 1, (name, before)
        file.write_text(text.replace(before, after))
    runner = build_runner(folder, folder / "host")
    return HostLibrary(folder, folder / "csrc", only=path, runner=runner)


PRECISION_AND_ROWS = {"mma": ("high", 8), "warpgroup": ("warpgroup high", 33)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_faults_of_kernels_are_caught(fault, tmp_path):
    path, changes, message = KERNEL_FAULTS[fault]
    precision, rows = PRECISION_AND_ROWS[path]
    faulty = build_faulty(tmp_path, path, changes)
    with pytest.raises(AssertionError, match=message):
        check_projection(faulty, rows, precision, kind="rademacher")


@pytest.mark.slow
@pytest.mark.parametrize("fault", SHARED_FAULTS)
def test_faults_that_kernels_and_runner_share_are_caught(fault, tmp_path):
    path, changes, message = SHARED_FAULTS[fault]
    precision, rows = PRECISION_AND_ROWS[path]
    faulty = build_faulty(tmp_path, path, changes)
    grads = torch.randint(-100, 101, (rows, PARAMS)).float()
    entries = torch.from_numpy(reference.projection_matrix(PARAMS, 20))
    assert torch.equal(faulty.project(grads, 20, precision=precision), grads @ entries)
    with pytest.raises(AssertionError, match=message):
        check_projection(faulty, rows, precision, kind="rademacher")


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
    const uint64_t operand = trak_ext::device::describe_operand(
        reinterpret_cast<void*>(address), static_cast<int>(leading), static_cast<int>(stride));
    const uint64_t moved = trak_ext::device::move_operand(operand, static_cast<int>(bytes));
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
    header = (SOURCES / "cuda" / "warpgroup_cuda.h").read_text()
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
    text = (SOURCES / "cuda" / "warpgroup_cuda.h").read_text()
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
    text = (SOURCES / "cuda" / "device_cuda.h").read_text()
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
