"""The compiled CUDA kernels, read from the extension: what is promised of them without a GPU."""

from __future__ import annotations

import re
import sys

import pytest

from trak_ext import _C


@pytest.fixture(scope="module")
def report():
    if not hasattr(_C, "cuda_kernels"):
        pytest.skip("trak_ext was built without CUDA")
    import machine_code

    if machine_code.find_cuobjdump() is None:
        pytest.skip("no cuobjdump (the CUDA toolkit and the triton package have one)")
    return machine_code


@pytest.fixture(scope="module")
def binary(report):
    return sys.modules[report.Kernel.__module__]


@pytest.fixture(scope="module")
def kernels(report):
    found = report.read_kernels(report.find_cuobjdump(), _C.__file__)
    assert found
    assert all(kernel.code for kernel in found)
    return found


def test_no_kernel_spills_or_uses_local_memory(kernels):
    assert [k.label for k in kernels if k.stack or k.local or k.spills] == []


def has_warpgroups(arch):
    return arch == 90 and "90a" in _C.cuda_build()["architectures"]


def test_every_tile_is_there_and_has_matrix_instructions(report, kernels):
    for arch in {k.arch for k in kernels if k.arch >= 80}:
        for path, instruction in (("mma", "HMMA"), ("wgmma", "HGMMA")):
            tiles = {k.tile: k for k in kernels if (k.arch, k.path) == (arch, path) and k.tile}
            expected = {report.tile_key(k) for k in _C.cuda_kernels(path, report.SHARED_LIMIT)}
            if path == "wgmma" and not has_warpgroups(arch):
                expected = set()
            assert set(tiles) == expected
            assert all(kernel.opcodes[instruction] > 0 for kernel in tiles.values())


def test_the_warpgroups_kernels_are_told_from_traps_by_their_registers(kernels):
    for kernel in kernels:
        if kernel.path == "wgmma":
            assert (kernel.registers > 40) == has_warpgroups(kernel.arch), kernel.label


def test_matrix_instructions_of_warpgroups_overlap(kernels):
    # Where ptxas cannot follow the registers of an instruction under way, it waits for each one.
    for kernel in kernels:
        if kernel.path == "wgmma" and kernel.tile is not None:
            waits = [text for _, text in kernel.code if "WARPGROUP.DEPBAR" in text]
            assert sum("gsb0, 0x1" in text for text in waits) >= len(waits) / 2, kernel.label
            groups = [0]
            for _, text in kernel.code:
                groups[-1] += "HGMMA" in text
                if "HGMMA" in text and "gsb0" in text:
                    groups.append(0)
            # Two steps of signs are started together, one of normal entries.
            kind, passes, _, _ = kernel.tile
            steps = {"rademacher": 2, "normal": 1}[kind]
            assert groups.pop() == 0
            assert set(groups) == {steps * passes}, kernel.label


def test_the_matrix_pipe_binds_from_64_rows_on(report, kernels):
    if not any(has_warpgroups(kernel.arch) for kernel in kernels):
        pytest.skip("not built for sm_90a")
    if _C.cuda_build()["runtime_version"] < 12080:
        pytest.skip("compilers before CUDA 12.8 get a smaller tile, which shared memory binds")
    for passes in (2, 3):
        problem = report.Problem(90, "wgmma", "rademacher", passes, 64, 10**8, 8192)
        assert report.times(kernels, problem)["binds"] == "matrix"


def test_no_kernel_asks_for_more_shared_memory_than_its_devices_have(report):
    # A block's limit on sm_86, 89 and 120, the least of those that run these kernels; on sm_80; on
    # sm_90 and 100. The runtime keeps nothing of it.
    for limit in (99 * 1024, 163 * 1024, 227 * 1024):
        assert max(k["shared_bytes"] for k in _C.cuda_kernels("mma", limit)) <= limit
        assert {k["tile_rows"] for k in _C.cuda_kernels("mma", limit)} >= {8, 32}
    assert max(k["shared_bytes"] for k in _C.cuda_kernels("wgmma", limit)) <= limit


def test_operands_are_copied_asynchronously_16_bytes_at_a_time_or_in_bulk(binary, kernels):
    # By the threads for the warp's matrix instruction; by one thread, a whole stage, for the
    # warpgroup's.
    for kernel in kernels:
        if kernel.arch >= 80 and kernel.tile is not None:
            copies = [t for _, t in kernel.code if binary.opcode(t) in ("LDGSTS", "UBLKCP")]
            name, modifier = ("UBLKCP", ".S.G") if kernel.path == "wgmma" else ("LDGSTS", ".128")
            assert copies, kernel.label
            assert all(name in text and modifier in text for text in copies), kernel.label
            # Nothing comes another way but, for normal entries, the table.
            others = sum(binary.opcode(text) == "LDG" for _, text in kernel.code)
            assert others == (kernel.tile[0] == "normal"), kernel.label


def test_fragments_are_loaded_as_matrices(kernels):
    for kernel in kernels:
        if kernel.arch >= 80 and kernel.tile is not None:
            assert (kernel.opcodes["LDSM"] > 0) == (kernel.path == "mma"), kernel.label


def test_gradients_are_split_16_bytes_at_a_time(kernels):
    # Aligned fp32, that is: 8 rows of 512 by 256 threads. Parts leave in whole core matrices.
    found = [k for k in kernels if "split_gradients_kernel" in k.name]
    assert len({kernel.label for kernel in found}) == 6
    for kernel in found:
        texts = [text for _, text in kernel.code]
        assert sum("LDG" in text and ".128" in text for text in texts) >= 4, kernel.label
        stores = [text for text in texts if "STG" in text]
        assert stores, kernel.label
        assert all(".128" in text for text in stores), kernel.label


@pytest.mark.parametrize("arch", [80, 90])
def test_signs_cost_at_most_one_and_a_half_alu_instructions_a_pair(report, kernels, arch):
    found = [k for k in kernels if k.arch == arch and k.tile and k.tile[0] == "rademacher"]
    if not found:
        pytest.skip(f"not built for sm_{arch}")
    for kernel in found:
        figures = report.loop_report(kernels, kernel)
        _, passes, columns, rows = kernel.tile
        steps = columns / 16 * 8 * passes
        assert figures["matrix"] == steps * (1 if kernel.path == "wgmma" else rows / 8)
        assert figures["target_alu_per_pair"] <= 1.5, (kernel.label, figures)
        # Shared memory works without bank conflicts.
        assert figures["wavefronts"] == figures["wavefronts_at_best"], (kernel.label, figures)


# Products of parts that are kept, by feature dtype and parts of the targets.
PRODUCTS = {
    **{("fp32", 1): 1, ("fp32", 2): 3, ("fp32", 3): 6},
    **{("fp16", 1): 1, ("fp16", 2): 3, ("fp16", 3): 5},
    **{("bf16", 1): 1, ("bf16", 2): 2, ("bf16", 3): 3},
}


def scoring_tiles(kernels, arch, path):
    found = [k for k in kernels if (k.arch, k.path) == (arch, path) and k.scoring_tile]
    return {k.scoring_tile: k for k in found}


def test_scoring_kernels_have_the_matrix_instructions_of_one_step_and_wide_accesses(kernels):
    for arch in {k.arch for k in kernels if k.arch >= 80}:
        tiles = scoring_tiles(kernels, arch, "mma")
        assert set(tiles) == {(*key, targets) for key in PRODUCTS for targets in (16, 64)}
        for (dtype, parts, targets), kernel in tiles.items():
            # 32 samples a warp, 16 an instruction; 8 targets an instruction.
            expected = PRODUCTS[dtype, parts] * 2 * targets // 8
            assert kernel.opcodes["HMMA"] == expected, kernel.label
            texts = [text for _, text in kernel.code]
            assert sum("LDS.128" in text for text in texts) >= targets // 16 * parts, kernel.label
            width = ".128" if dtype == "fp32" else ".64"
            assert any("LDGSTS" in text and width in text for text in texts), kernel.label


def test_no_kernel_takes_generic_loads_or_stores(kernels):
    # They are slower, and say that the compiler does not know which memory is meant.
    generic = ("LD", "ST", "ATOM")
    assert [k.label for k in kernels if any(k.opcodes[name] for name in generic)] == []


def test_the_warpgroups_scoring_kernels_issue_less_than_the_tensor_cores_work(binary, kernels):
    tiles = scoring_tiles(kernels, 90, "wgmma")
    if not has_warpgroups(90):
        assert tiles == {}
        pytest.skip("not built for sm_90a")
    assert set(tiles) == {(*key, targets) for key in PRODUCTS for targets in (16, 32, 64, 128)}
    for (dtype, parts, targets), kernel in tiles.items():
        # Two steps a turn of the main loop where sums leave after each, else four.
        products = PRODUCTS[dtype, parts] * (2 if parts == 3 else 4)
        assert kernel.opcodes["HGMMA"] == products, kernel.label
        assert any("LDGSTS" in text and ".128" in text for _, text in kernel.code), kernel.label
        loops = []
        for address, text in kernel.code:
            target = binary.branch_target(text)
            if target is not None and target < address:
                inside = [binary.opcode(t) for a, t in kernel.code if target <= a <= address]
                if "HGMMA" in inside:
                    loops.append(inside)
        # Three warpgroups take turns. The copies of single elements and the way to the next
        # checkpoint are counted as if they were always taken.
        if targets == 128 and PRODUCTS[dtype, parts] >= 3:
            assert len(min(loops, key=len)) <= products * targets / 2, kernel.label


def sparse_loop(binary, kernel):
    """Return the loop over chunks that a tensor has all of: the inner one with the most loads."""
    loops = []
    for address, text in kernel.code:
        target = binary.branch_target(text)
        if target is not None and target < address:
            inside = [t for a, t in kernel.code if target <= a < address]
            if not any("BRA" in t for t in inside):
                loops.append(inside)
    return max(loops, key=lambda loop: sum("LDG" in text for text in loop))


def test_sparse_kernels_keep_many_loads_under_way_in_few_issue_slots(binary, kernels):
    # While the memory of an H200 brings 32 elements of fp32 to a multiprocessor, its schedulers
    # have some 25 issue slots.
    slots = {"8": 7.5, "4": 10.0, "2": 17.0, "1": 28.0}
    found = [kernel for kernel in kernels if "sjlt_sum_kernel" in kernel.name]
    if not found:
        pytest.skip("no sparse kernels")
    assert len({kernel.name for kernel in found}) == 16
    for kernel in found:
        dtype, rows = re.search(r"DTypeE(\d)ELi(\d)E", kernel.name).groups()
        loop = sparse_loop(binary, kernel)
        loads = sum("LDG" in text for text in loop)
        assert loads >= (8 if dtype == "0" or rows == "1" else 32 if rows == "8" else 16)
        # An fp32 or converted element: a load and an addition or multiply-add of one rounding.
        assert sum("FFMA" in text for text in loop) == loads, kernel.name
        if dtype == "1" and kernel.arch >= 80:
            assert len(loop) / loads <= slots[rows], (kernel.name, len(loop) / loads)
