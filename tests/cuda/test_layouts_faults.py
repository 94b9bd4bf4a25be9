"""Faults planted where only the layouts of operands can tell: test_layouts.py's checks must."""

from __future__ import annotations

import shutil

import pytest
import torch

from cuda_host.builds import HOST, SOURCES, build_runner
from cuda_host.library import HostLibrary
from cuda_host.numbered import PARAMS, check_projection
from trak_ext import reference

# Faults of the kernels, and faults that they share with the runner that plays them, so that results
# are right and no other test can tell. Path, then file under csrc/cuda or the helpers' cuda_host,
# what stands there and what is put in its place, and what is said.
DESCRIBED = "kHalfBytes,\n                                    kCoreBytes);"
NOT_BESIDE = "entries that are not those of the gradients beside them"
KERNEL_FAULTS = {
    "halves of a register": (
        "mma",
        [
            (
                "csrc/cuda/projection/entries.h",
                "return {lower, lower + 16};",
                "return {lower + 16, lower};",
            ),
        ],
        NOT_BESIDE,
    ),
    "order of registers": (
        "mma",
        [
            (
                "csrc/cuda/projection/entries.h",
                "a[2 + i] = pair_of_signs(word);",
                "a[3 - i] = pair_of_signs(word);",
            ),
        ],
        NOT_BESIDE,
    ),
    "leading offset": (
        "warpgroup",
        [("csrc/cuda/projection/operand_ring.h", DESCRIBED, "kCoreBytes, kCoreBytes);")],
        "gradients of several parameters|rows are not in order|" + NOT_BESIDE,
    ),
    "rows of a core matrix": (
        "warpgroup",
        [("csrc/cuda/projection/split_gradients_kernel.h", "+ row * 16;", "+ (row ^ 1) * 16;")],
        "rows are not in order",
    ),
}
SHARED_FAULTS = {
    "leading and stride offsets exchanged": (
        "warpgroup",
        [
            ("csrc/cuda/projection/operand_ring.h", DESCRIBED, "kCoreBytes, kHalfBytes);"),
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
            (
                "csrc/cuda/projection/entries.h",
                "return {lower, lower + 16};",
                "return {lower + 16, lower};",
            ),
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
                "csrc/cuda/projection/entries.h",
                "a[i] = pair_of_signs(word);",
                "a[2 * i] = pair_of_signs(word);",
            ),
            (
                "csrc/cuda/projection/entries.h",
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
            ("csrc/cuda/projection/block_tile.h", "lane % 4 * 2 + i;", "lane % 4 + 4 * i;"),
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
