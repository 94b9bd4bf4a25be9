"""Machine code of the warpgroup's kernels: registers under way are left alone, on every path."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from folders import CSRC
from trak_ext import _C

SOURCES = CSRC / "cuda"


@pytest.fixture(scope="module")
def bench():
    import cuda_binary
    import warpgroup_hazards

    return cuda_binary, warpgroup_hazards


@pytest.fixture(scope="module")
def check(bench):
    return bench[1].check_warpgroups


@pytest.fixture(scope="module")
def kernels(bench):
    cuda_binary, _ = bench
    if not hasattr(_C, "cuda_kernels"):
        pytest.skip("trak_ext was built without CUDA")
    cuobjdump = cuda_binary.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump (the CUDA toolkit and the triton package have one)")
    if "90a" not in _C.cuda_build()["architectures"]:
        pytest.skip("not built for sm_90a")
    found = [k for k in cuda_binary.read_kernels(cuobjdump, _C.__file__) if k.opcodes["HGMMA"]]
    tiles = {k["tile_rows"] for k in _C.cuda_kernels("wgmma", 227 * 1024)}
    assert {kernel.tile[3] for kernel in found if kernel.tile} == tiles
    assert all(kernel.tile or kernel.scoring_tile for kernel in found)
    return found


def test_no_register_of_a_matrix_instruction_is_touched_while_it_is_under_way(kernels, check):
    assert {k.label: faults for k in kernels if (faults := check(k.code))} == {}


def test_arrive_commit_and_wait_come_in_order(kernels):
    # A fence before every group, and a wait after the last one.
    for kernel in kernels:
        order = "".join(
            "G" if "HGMMA" in text else "A" if "ARRIVE" in text else "w"
            for _, text in kernel.code
            if "WARPGROUP" in text or ("HGMMA" in text and "gsb0" in text)
        )
        assert re.fullmatch(r"(w*Aw*G)+w+", order), (kernel.label, order)


# A hand-made kernel: two groups in a loop, the next first operand made while one is under way.
LOOP = """
MOV R1, c[0x0][0x28]
WARPGROUP.DEPBAR.LE gsb0, 0x1
LOP3.LUT R24, R1, R2, R3, 0xae, !PT
WARPGROUP.ARRIVE
HGMMA.64x8x16.F32.BF16 R16, R24, gdesc[UR4], R16, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
IMAD.WIDE.U32 R28, R1, 0x2, R2
IMAD.WIDE.U32 R30, R1, 0x2, R2
WARPGROUP.ARRIVE
HGMMA.64x8x16.F32.BF16 R16, R28, gdesc[UR4], R16, gsb0
@P0 BRA 0x10
WARPGROUP.DEPBAR.LE gsb0, 0x0
STG.E.128 desc[UR6][R2.64], R16
EXIT
"""


def listing(text: str) -> list[tuple[int, str]]:
    return [(16 * i, line) for i, line in enumerate(text.strip().splitlines())]


# What is replaced in it, by what, and what is said.
FAULTS = {
    "write in flight": ("LOP3.LUT R24", "LOP3.LUT R28", "writes the first operand"),
    "write in flight by the second of two registers": (
        "IMAD.WIDE.U32 R30, R1, 0x2, R2",
        "IMAD.WIDE.U32 R26, R1, 0x2, R2",
        "writes the first operand",
    ),
    "no wait, seen round the loop alone": (
        "MOV R1, c[0x0][0x28]\nWARPGROUP.DEPBAR.LE gsb0, 0x1",
        "MOV R1, c[0x0][0x28]\nNOP",
        "writes the first operand",
    ),
    "wait for too few": (
        "gsb0, 0x1\nIMAD.WIDE.U32 R28",
        "gsb0, 0x2\nIMAD.WIDE.U32 R28",
        "writes the first operand",
    ),
    "no fence": ("WARPGROUP.ARRIVE\nHGMMA.64x8x16.F32.BF16 R16, R28", None, "since the last fence"),
    "group not ended": ("R16, gsb0\n@P0", "R16\n@P0", "a group that was not ended"),
    "sums read in flight": ("WARPGROUP.DEPBAR.LE gsb0, 0x0\n", "NOP\n", "touches the sums"),
    "sums written in flight": ("IMAD.WIDE.U32 R30", "IMAD.WIDE.U32 R18", "touches the sums"),
    "sums of another shape": ("64x8x16.F32.BF16 R16, R28", "64x16x16.F32.BF16 R16, R28", "a part"),
    "end in flight": (
        "WARPGROUP.DEPBAR.LE gsb0, 0x0\nSTG.E.128 desc[UR6][R2.64], R16\n",
        "",
        "leaves with a matrix instruction under way",
    ),
    "not reached": (
        "@P0 BRA 0x10",
        "EXIT\nHGMMA.64x8x16.F32.BF16 R16, R28, gdesc[UR4], RZ",
        "not r",
    ),
}


def test_the_hand_made_kernel_is_right(check):
    assert check(listing(LOOP)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_planted_in_a_hand_made_kernel_are_caught(check, fault):
    before, after, message = FAULTS[fault]
    if after is None:
        after = before.replace("WARPGROUP.ARRIVE", "NOP")
    assert LOOP.count(before) == 1
    assert any(message in found for found in check(listing(LOOP.replace(before, after))))


@pytest.mark.parametrize("what", ["gsb0, 0x1", "gsb0, 0x0", "WARPGROUP.ARRIVE", ", gsb0"])
def test_faults_planted_in_the_real_kernels_are_caught(kernels, check, what):
    # Waits, fences or the ends of groups are taken out: all, or the last. Not each one is needed:
    # ptxas may take a third set of registers where two are asked for, and where scores leave after
    # every step the next one waits again for nothing.
    for kernel in kernels:
        places = [i for i, (_, text) in enumerate(kernel.code) if what in text]
        if kernel.scoring_tile and what == "gsb0, 0x1":
            assert not places, kernel.label  # it waits for all
            continue
        assert places, (kernel.label, what)
        for out in (places, places[-1:]):
            doctored = list(kernel.code)
            for i in out:
                address, text = doctored[i]
                doctored[i] = (address, text.replace(what, "") if "HGMMA" in text else "NOP")
            caught = check(doctored)
            assert caught or (what == "gsb0, 0x1" and len(out) == 1), (kernel.label, what)


# --- What ptxas says -----------------------------------------------------------------------------

# C7510 to C7519 and their like: ptxas serialises matrix instructions, or waits where nobody asked.
PROBE = """
#include "device/device.h"
using namespace trak_ext::cuda;
__global__ void __launch_bounds__(128) probe(float* out, const uint32_t* in, int n) {
  extern __shared__ char shared[];
  const uint64_t b = device::describe_operand(shared, 128, 128);
  float d[1][4] = {};
  uint32_t a[1][4];
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < 4; ++k) a[0][k] = in[i * 4 + k];
    device::begin_multiply(a, d);
    device::multiply_async<8>(d, a[0], b, true);
    device::commit_multiplied();
    TOUCH
    device::wait_multiplied<0>();
  }
  device::finish_multiply(d);
  for (int k = 0; k < 4; ++k) out[threadIdx.x * 4 + k] = d[0][k];
}
"""


def compile_sm90a(source: Path, folder: Path) -> str:
    """Return what nvcc and ptxas say of a file."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++17", "-arch=sm_90a", "-fmad=false", f"-I{SOURCES}", "-cubin"]
    command = [nvcc, *flags, str(source), "-o", str(folder / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", sorted(SOURCES.rglob("*_warpgroup_tiles.cu")), ids=lambda p: p.stem
)
def test_ptxas_serialises_no_matrix_instruction(source, tmp_path):
    assert compile_sm90a(source, tmp_path) == ""


def test_ptxas_would_say_so(tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(PROBE.replace("TOUCH", ""))
    assert compile_sm90a(source, tmp_path) == ""
    source.write_text(PROBE.replace("TOUCH", "d[0][0] += 1.0f;"))
    said = compile_sm90a(source, tmp_path)
    assert re.search(r"\(C75\d\d\).*(serialized|injected)", said)
