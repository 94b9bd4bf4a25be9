"""Faults planted in copies of the CUDA projection's source: running it on the host must tell.

What a GPU would forgive is an error there: see cuda_host/device_host.h.
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from cuda_host.builds import SOURCES, build_runner
from cuda_host.library import HostLibrary
from trak_ext import reference

# File, what stands there, what is put in its place, and what must be said; "" for a wrong result.
SPLIT_FAULTS = {
    "read past the end": (
        "split_gradients_kernel.h",
        "param >= span_.begin && param + 4 <= span_.end",
        "param >= span_.begin && param < span_.end",
        "global memory out of bounds",
    ),
    "read before the beginning": (
        "split_gradients_kernel.h",
        "param >= span_.begin && param + 4 <= span_.end",
        "param + 4 > span_.begin && param + 4 <= span_.end",
        "global memory out of bounds",
    ),
    "read of rows that do not exist": (
        "split_gradients_kernel.h",
        "return row_of(row) < split_.problem.rows;",
        "return row >= 0;",
        "global memory out of bounds",
    ),
    "parts stored before all is loaded": (
        "split_gradients_kernel.h",
        "  device::block_barrier();\n",
        "",
        "another thread|nobody wrote",
    ),
    "last superblock left out": (
        "split_gradients_kernel.h",
        "return superblock_ < span_.num_superblocks;",
        "return superblock_ + 1 < span_.num_superblocks;",
        "",
    ),
    "wrong slot of the other operand": (
        "entries.h",
        "128 * slot + 32 * stage + 15 - half",
        "128 * (slot ^ 1) + 32 * stage + 15 - half",
        "",
    ),
    "halves of a register exchanged": (
        "entries.h",
        "return {lower, lower + 16};",
        "return {lower + 16, lower};",
        "",
    ),
    "halves of a step exchanged": (
        "split_gradients_kernel.h",
        "half % 2 * (step_bytes / 2)",
        "(1 - half % 2) * (step_bytes / 2)",
        "",
    ),
    "rows of a core matrix exchanged": (
        "split_gradients_kernel.h",
        "(step_bytes / 2) + row * 16",
        "(step_bytes / 2) + (row ^ 1) * 16",
        "",
    ),
    "wrong fragment register": (
        "entries.h",
        "a[2 + i] = pair_of_signs(word);",
        "a[3 - i] = pair_of_signs(word);",
        "",
    ),
    "wrong sign bit": (
        "entries.h",
        "word *= two_;\n      a[2 + i]",
        "a[2 + i]",
        "",
    ),
    "chunk dropped": (
        "run_projection.h",
        "chunk < cut.chunks; chunk += shape.chunks",
        "chunk + 1 < cut.chunks; chunk += shape.chunks",
        "",
    ),
}

MMA_FAULTS = {
    "missing barrier": (
        "multiply_kernel.h",
        "wait_copies<Tile::kSlots - 2>();\n    device::block_barrier();",
        "wait_copies<Tile::kSlots - 2>();",
        "another thread|under way|nobody wrote",
    ),
    "copies not waited for": (
        "multiply_kernel.h",
        "device::wait_copies<Tile::kSlots - 2>();",
        "device::wait_copies<Tile::kSlots - 1>();",
        "under way",
    ),
    "slot refilled while it is read": (
        "multiply_kernel.h",
        "slots.fetch(slot + Tile::kSlots - 1);",
        "slots.fetch(slot + Tile::kSlots);",
        "another thread|under way|nobody wrote",
    ),
    "wrong step": (
        "operand_slots.h",
        "stage + step * kStepBytes",
        "stage + (step ^ 1) * kStepBytes",
        "",
    ),
    "sums of rows that do not exist": (
        "block_tile.h",
        "if (row >= tile.rows) continue;",
        "",
        "global memory out of bounds",
    ),
}

WARPGROUP_FAULTS = {
    "stage not waited for": (
        "warpgroup_kernel.h",
        "    ring.wait_filled(stage);\n",
        "",
        "under way|nobody wrote|not waited for",
    ),
    "slot refilled while it is read": (
        "operand_ring.h",
        "    device::wait_arrivals(emptied(stage % Tile::kSlots), stage / Tile::kSlots % 2);\n",
        "",
        "may read it|under way|not waited for|does not expect",
    ),
    "slot refilled when one warp is done": (
        "warpgroup_kernel.h",
        "/ warpgroup_columns * 4);",
        "/ warpgroup_columns);",
        "may read it|under way|not waited for|does not expect|never come",
    ),
    "released before it is multiplied": (
        "warpgroup_kernel.h",
        "    multiply_operand<Tile>(ring.describe(stage), entries, sums);\n",
        "    if (device::thread_index() % 32 == 0) ring.release(stage);\n"
        "    multiply_operand<Tile>(ring.describe(stage), entries, sums);\n",
        "may read it|under way|not waited for|does not expect|never come",
    ),
    "wrong parity": (
        "operand_ring.h",
        "device::wait_arrivals(filled(stage % Tile::kSlots), stage / Tile::kSlots % 2);",
        "device::wait_arrivals(filled(stage % Tile::kSlots), 1 - stage / Tile::kSlots % 2);",
        "under way|nobody wrote|not waited for|never come",
    ),
    "fewer bytes expected than come": (
        "operand_ring.h",
        "device::expect_bytes(filled(slot), kStageBytes);",
        "device::expect_bytes(filled(slot), kStageBytes / 2);",
        "under way|nobody wrote|not waited for|never come",
    ),
    "barriers not published": (
        "operand_ring.h",
        "    device::publish_arrivals();\n",
        "",
        "not published",
    ),
    "missing barrier": (
        "warpgroup_kernel.h",
        "  device::block_barrier();\n",
        "",
        "was not begun|another thread began",
    ),
    "missing fence of registers": (
        "warpgroup_kernel.h",
        "        device::begin_multiply(group, products);\n",
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
    "wrong leading dimension": (
        "operand_ring.h",
        "kStageBytes, kHalfBytes,\n                                    kCoreBytes);",
        "kStageBytes, kCoreBytes,\n                                    kCoreBytes);",
        "",
    ),
    "wrong stride": (
        "operand_ring.h",
        "kStageBytes, kHalfBytes,\n                                    kCoreBytes);",
        "kStageBytes, kHalfBytes,\n                                    kHalfBytes);",
        "a matrix instruction reads|",
    ),
    "wrong step": (
        "operand_ring.h",
        "(step * Tile::kPasses + pass) * kStepBytes",
        "((step ^ 1) * Tile::kPasses + pass) * kStepBytes",
        "",
    ),
}
FAULTS = {
    "mma": SPLIT_FAULTS | MMA_FAULTS,
    "warpgroup": SPLIT_FAULTS | WARPGROUP_FAULTS,
}
CASES = [(path, name) for path, faults in FAULTS.items() for name in (None, *faults)]


@pytest.fixture(scope="module")
def runner():
    return build_runner()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "fault"), CASES)
def test_planted_faults_are_caught(path, fault, tmp_path, runner):
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    message = ""
    if fault is not None:
        name, before, after, message = FAULTS[path][fault]
        file = sources / "cuda" / "projection" / name
        text = file.read_text()
        assert text.count(before) == 1
        file.write_text(text.replace(before, after))
    faulty = HostLibrary(tmp_path, sources, only=path, runner=runner)
    grads = torch.randint(-100, 101, (3, 4200)).float()
    arguments = {"param_offset": 2}
    tile_rows = 8
    if path == "warpgroup":
        # Several core matrices in either direction, and two warpgroups.
        arguments |= {"precision": "warpgroup high", "tile_for_rows": 33}
        tile_rows = 64
    pieces = torch.zeros(3 * 4200 + 2)[2:].view(3, 4200).copy_(grads)  # four at a time at offset 2
    proj_dim = 300
    # No byte more than a chunk's two parts and its sums need.
    arguments["workspace_bytes"] = 2048 * tile_rows * 2 * 2 + 3 * proj_dim * 4
    expected = grads @ torch.from_numpy(reference.projection_matrix(4200, proj_dim, param_offset=2))
    for order_seed in range(1, 5):
        try:
            got = faulty.project(pieces, proj_dim, order_seed=order_seed, **arguments)
        except RuntimeError as error:
            found = str(error)
            break
        if fault is None or "" in message.split("|"):
            assert torch.equal(got, expected) == (fault is None)
            return
    else:
        found = "nothing"
    assert message
    assert re.search(message, found)
