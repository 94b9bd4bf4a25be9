"""Faults planted in copies of the CUDA projection's source: running it on the host must tell.

What a GPU would forgive is an error there: see cuda_host/device_host.h.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from cuda_host.library import SOURCES, HostLibrary, build_runner
from trak_ext import reference

# File, what stands there, what is put in its place, and what must be said; "" for a wrong result.
MMA_FAULTS = {
    "missing barrier": (
        "multiply_kernel.h",
        "wait_copies<Tile::kSlots - 2>();\n    device::block_barrier();",
        "wait_copies<Tile::kSlots - 2>();",
        "another thread|under way",
    ),
    "copies not waited for": (
        "multiply_kernel.h",
        "device::wait_copies<Tile::kSlots - 2>();",
        "device::wait_copies<Tile::kSlots - 1>();",
        "under way",
    ),
    "one buffer for two": (
        "gradient_tile.h",
        "char* fragments = fragments_ + stage % 2 * kFragmentBytes;",
        "char* fragments = fragments_;",
        "another thread|nobody wrote",
    ),
    "slot refilled while it is read": (
        "multiply_kernel.h",
        "gradients.fetch(stage + Tile::kSlots);",
        "gradients.fetch(stage + Tile::kSlots + 1);",
        "another thread|under way|nobody wrote",
    ),
    "wrong fragment register": (
        "entries.h",
        "a[2 + i] = pair_of_signs(word);",
        "a[3 - i] = pair_of_signs(word);",
        "",
    ),
    "wrong slot of the other operand": (
        "entries.h",
        "{slot, 3 - pair, 7 - pair}",
        "{slot ^ 1, 3 - pair, 7 - pair}",
        "",
    ),
    "read past the end": (
        "gradient_slots.h",
        "param >= tile.begin && param + elements <= tile.end",
        "param >= tile.begin && param < tile.end",
        "global memory out of bounds",
    ),
    "read before the beginning": (
        "gradient_slots.h",
        "param >= tile.begin && param + elements <= tile.end",
        "param + elements > tile.begin && param + elements <= tile.end",
        "global memory out of bounds",
    ),
    "read of rows that do not exist": (
        "gradient_slots.h",
        "inside ? tile.rows : 0; row < rows;",
        "inside ? Tile::kRows : 0; row < rows;",
        "global memory out of bounds",
    ),
    "sums of rows that do not exist": (
        "block_tile.h",
        "if (row >= tile.rows) continue;",
        "",
        "global memory out of bounds",
    ),
}

WARPGROUP_FAULTS = {
    "missing barrier": (
        "warpgroup_kernel.h",
        "wait_copies<Tile::kSlots - 2>();\n    device::block_barrier();",
        "wait_copies<Tile::kSlots - 2>();",
        "another thread|under way|since the last barrier",
    ),
    "missing proxy fence": (
        "warpgroup_kernel.h",
        "          device::publish_operand();\n",
        "",
        "not published",
    ),
    "missing fence of registers": (
        "warpgroup_kernel.h",
        "        device::begin_multiply(a[i % kAhead], products);\n",
        "",
        "since the last fence",
    ),
    "registers made anew without a wait": (
        "warpgroup_kernel.h",
        "        device::wait_multiplied<kAhead - 1>();\n",
        "",
        "a register of a matrix instruction changed",
    ),
    "registers made anew a group too early": (
        "warpgroup_kernel.h",
        "device::wait_multiplied<kAhead - 1>();",
        "device::wait_multiplied<kAhead>();",
        "a register of a matrix instruction changed",
    ),
    "sums read without a wait": (
        "warpgroup_kernel.h",
        "    device::finish_multiply(products);\n",
        "",
        "changed|under way|since the last fence|may read it",
    ),
    "groups not committed": (
        "warpgroup_kernel.h",
        "        device::commit_multiplied();\n",
        "",
        "changed|under way|may read it",
    ),
    "a pass that starts from nothing": (
        "warpgroup_kernel.h",
        "!kSetsFirst || step + pass > 0",
        "!kSetsFirst || step > 0",
        "",
    ),
    "one buffer for two": (
        "shared_operand.h",
        "char* operand = operand_ + stage % 2 * kStageBytes;",
        "char* operand = operand_;",
        "another thread|nobody wrote|may read it|since the last barrier",
    ),
    "wrong leading dimension": (
        "shared_operand.h",
        "* kStageBytes, kHalfBytes, kCoreBytes);",
        "* kStageBytes, kCoreBytes, kCoreBytes);",
        "",
    ),
    "wrong stride": (
        "shared_operand.h",
        "* kStageBytes, kHalfBytes, kCoreBytes);",
        "* kStageBytes, kHalfBytes, kHalfBytes);",
        "a matrix instruction reads",
    ),
    "wrong step": (
        "shared_operand.h",
        "step * kStepBytes + pass * kPassBytes",
        "step * kHalfBytes + pass * kPassBytes",
        "",
    ),
    "rows of a core matrix exchanged": (
        "shared_operand.h",
        "row * 16 + 4 * first_slot",
        "(row ^ 1) * 16 + 4 * first_slot",
        "",
    ),
    "wrong fragment register": (
        "entries.h",
        "a[2 + i] = pair_of_signs(word);",
        "a[3 - i] = pair_of_signs(word);",
        "",
    ),
    "copies not waited for": (
        "warpgroup_kernel.h",
        "device::wait_copies<Tile::kSlots - 2>();",
        "device::wait_copies<Tile::kSlots - 1>();",
        "under way",
    ),
    "slot refilled while it is read": (
        "warpgroup_kernel.h",
        "gradients.fetch(stage + Tile::kSlots);",
        "gradients.fetch(stage + Tile::kSlots + 1);",
        "another thread|under way|nobody wrote",
    ),
}
CASES = [("mma", name) for name in MMA_FAULTS]
CASES += [("warpgroup", name) for name in WARPGROUP_FAULTS]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return build_runner(tmp_path_factory.mktemp("runner"))


@pytest.mark.parametrize(("path", "fault"), [*CASES, ("mma", None), ("warpgroup", None)])
def test_planted_faults_are_caught(path, fault, tmp_path, runner):
    faults = MMA_FAULTS if path == "mma" else WARPGROUP_FAULTS
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    message = ""
    if fault is not None:
        name, before, after, message = faults[fault]
        file = sources / "cuda" / name
        text = file.read_text()
        assert text.count(before) == 1
        file.write_text(text.replace(before, after))
    faulty = HostLibrary(tmp_path, sources, only=path, runner=runner)
    grads = torch.randint(-100, 101, (3, 1100)).float()
    arguments = {"param_offset": 2, "workspace_bytes": 3 * 20 * 4}
    if path == "warpgroup":
        # Several core matrices in either direction.
        arguments |= {"precision": "warpgroup high", "tile_for_rows": 33}
    pieces = torch.zeros(3 * 1100 + 2)[2:].view(3, 1100).copy_(grads)  # 16-byte copies at offset 2
    if message:
        with pytest.raises(RuntimeError, match=message):
            faulty.project(pieces, 20, **arguments)
        return
    got = faulty.project(pieces, 20, **arguments)
    expected = grads @ torch.from_numpy(reference.projection_matrix(1100, 20, param_offset=2))
    assert torch.equal(got, expected) == (fault is None)
