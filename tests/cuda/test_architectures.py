"""What a device of each compute capability loads from a build with the default architectures.

The rules are NVIDIA's (CUDA programming guide, "Binary compatibility" and "PTX compatibility").
"""

from __future__ import annotations

import re

import pytest

from folders import ROOT
from trak_ext import _C

CMAKE = ROOT / "CMakeLists.txt"
# Of boards, which take no code made for cards: Orin, its successors and Thor. Where nothing says
# that one does, it is here.
BOARDS = {87, 88, 110}
CAPABILITIES = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]


def what_loads(capability: int, architectures: list[str]) -> str | None:
    """Return what the driver takes of CMake's architectures, as nvcc names it, or None."""
    code, ptx = [], []
    for architecture in architectures:
        number, suffix, kind = re.fullmatch(
            r"(\d+)([af]?)(?:-(real|virtual))?", architecture
        ).groups()
        if suffix == "f":
            raise NotImplementedError("code of a family")
        if kind != "virtual":
            code.append((int(number), suffix))
        if kind != "real":
            ptx.append((int(number), suffix))
    exact = [suffix for number, suffix in code if number == capability]
    if exact:
        return f"sm_{capability}{max(exact)}"
    lower = [
        number
        for number, suffix in code
        if suffix == "" and number // 10 == capability // 10 and number < capability
    ]
    if lower and capability not in BOARDS:
        return f"sm_{max(lower)}"
    texts = [number for number, suffix in ptx if suffix == "" and number <= capability]
    texts += [number for number, suffix in ptx if suffix == "a" and number == capability]
    return f"compute_{max(texts)}" if texts else None


def default_architectures(toolkit: str) -> list[str]:
    """Return the list that CMakeLists.txt has for CUDA `toolkit` and later."""
    text = CMAKE.read_text()
    (names,) = re.findall(rf"set\(cuda_architectures_{toolkit} ([^)]*)\)", text)
    found = []
    for name in names.split():
        other = re.fullmatch(r"\$\{cuda_architectures_(\w+)\}", name)
        found += [name] if other is None else default_architectures(other[1])
    return found


def loads_of(architectures: list[str]) -> dict[int, str | None]:
    return {capability: what_loads(capability, architectures) for capability in CAPABILITIES}


UP_TO_90 = {
    **{75: "sm_75", 80: "sm_80", 86: "sm_86", 87: "compute_80", 88: "compute_80"},
    **{89: "sm_89", 90: "sm_90a"},
}


def test_every_capability_from_7_5_to_12_1_loads_something():
    later = dict.fromkeys([100, 103, 110, 120, 121], "compute_80")
    assert loads_of(default_architectures("12_4")) == {**UP_TO_90, **later}
    later = {100: "sm_100", 103: "sm_100", 110: "compute_80", 120: "sm_120", 121: "sm_120"}
    assert loads_of(default_architectures("12_8")) == {**UP_TO_90, **later}


@pytest.mark.parametrize("toolkit", ["12_4", "12_8"])
def test_what_comes_later_loads_ptx_that_has_matrix_instructions(toolkit):
    assert what_loads(130, default_architectures(toolkit)) == "compute_80"
    for capability, loaded in loads_of(default_architectures(toolkit)).items():
        # device_guard.h reads this number; below 80 it takes the plain path.
        assert (int(re.findall(r"\d+", loaded)[0]) >= 80) == (capability >= 80)


@pytest.mark.skipif(not hasattr(_C, "cuda_project"), reason="trak_ext was built without CUDA")
def test_this_builds_architectures_are_of_a_known_form():
    architectures = _C.cuda_build()["architectures"].split()
    if "native" in architectures or "all" in architectures or "all-major" in architectures:
        pytest.skip("CMake chose the architectures")
    assert any(loads_of(architectures).values())
