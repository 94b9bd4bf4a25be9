"""Every CPU level, each in a process of its own: the same law, and sums that agree."""

from __future__ import annotations

import numpy as np
import pytest

import trak_ext
from children import run_python

# Runs in the child: prints the level; saves the matrices and sums.
CHILD = """
import sys
import numpy as np, torch, trak_ext
assert trak_ext.build_info()["cpu_level"] == sys.argv[1]
generator = torch.Generator().manual_seed(1)
results = {}
for kind in ("rademacher", "normal"):
    for offset in (0, 77, 2**40 + 3):
        law = dict(kind=kind, seed=2**63 + 5, model_id=9, param_offset=offset)
        results[f"matrix {kind} {offset}"] = trak_ext.projection_matrix(700, 45, **law).numpy()
        for rows in (1, 2, 7, 13, 66):
            grads = torch.randint(-20, 21, (rows, 700), generator=generator)
            eye = torch.eye(700)[:rows]
            results[f"unit {kind} {offset} {rows}"] = trak_ext.project(eye, 45, **law).numpy()
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                got = trak_ext.project(grads.to(dtype), 45, **law)
                results[f"integers {kind} {offset} {rows} {dtype}"] = got.numpy()
    grads = torch.randn(33, 9000, generator=generator)
    results[f"reals {kind}"] = trak_ext.project(grads, 50, kind=kind).numpy()
    alone = torch.cat([trak_ext.project(row[None], 50, kind=kind) for row in grads])
    assert np.array_equal(alone.numpy(), results[f"reals {kind}"])
for proj_dim in (1, 6, 36, 258, 1026, 9000):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        spread = torch.rand(3, 30001, generator=generator) * 8 - 4
        grads = torch.randn(3, 30001, generator=generator) * 10**spread
        grads[1, 777], grads[2, 778] = torch.inf, torch.nan
        law = dict(kind="sjlt", seed=3, param_offset=4095)
        for nnz in (1, proj_dim // 3 or 1):
            few = grads[:, : 30001 if nnz == 1 else 5001].to(dtype)  # many nodes of sums still
            got = trak_ext.project(few, proj_dim, nnz=nnz, **law)
            results[f"sparse {proj_dim} {nnz} {dtype}"] = got.numpy().view("<u4")
halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
results["every fp16"] = trak_ext.project(halves, 1).numpy()
for dtype in (torch.float64, torch.float32):
    train = torch.randn(2, 100, 37, generator=generator, dtype=dtype)
    targets = torch.randn(2, 29, 37, generator=generator, dtype=dtype)
    results[f"scores {dtype}"] = trak_ext.score(train, targets).numpy()
    results[f"best {dtype}"] = trak_ext.top_k(train, targets, 5).indices.numpy()
np.savez(sys.argv[2], **results)
"""


def run_level(level: str, path) -> dict[str, np.ndarray]:
    run_python(CHILD, level, str(path), TRAK_EXT_CPU_LEVEL=level)
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("levels")
    return {
        level: run_level(level, folder / f"{level}.npz")
        for level in trak_ext.build_info()["cpu_levels"]
    }


def test_matrices_are_the_law(results):
    for found in results.values():
        for kind in ("rademacher", "normal"):
            for offset in (0, 77, 2**40 + 3):
                law = {"kind": kind, "seed": 2**63 + 5, "model_id": 9, "param_offset": offset}
                expected = trak_ext.reference.projection_matrix(700, 45, **law)
                assert np.array_equal(found[f"matrix {kind} {offset}"], expected)
                for rows in (1, 2, 7, 13, 66):
                    assert np.array_equal(found[f"unit {kind} {offset} {rows}"], expected[:rows])


def test_integer_sums_agree_to_the_bit(results):
    baseline = results["baseline"]
    for found in results.values():
        for name, value in found.items():
            if name.startswith("integers rademacher"):
                assert np.array_equal(value, baseline[name]), name


def test_sparse_features_agree_to_the_bit(results):
    names = [name for name in results["baseline"] if name.startswith("sparse")]
    assert len(names) == 44
    for found in results.values():
        for name in names:
            assert np.array_equal(found[name], results["baseline"][name]), name


def test_real_sums_agree_to_tolerance(results):
    baseline = results["baseline"]
    for found in results.values():
        for name, value in found.items():
            if name.startswith("sparse"):
                continue
            scale = np.nanmax(np.abs(baseline[name]), initial=1, where=np.isfinite(baseline[name]))
            np.testing.assert_allclose(value, baseline[name], rtol=0, atol=2e-6 * scale)


def test_unknown_level_is_refused():
    code = "import torch, trak_ext; trak_ext.project(torch.ones(1, 1), 1)"
    run = run_python(code, check=False, TRAK_EXT_CPU_LEVEL="avx1024")
    assert run.returncode != 0
    expected = "ValueError: TRAK_EXT_CPU_LEVEL: expected a level that this machine runs (baseline"
    assert expected in run.stderr
    assert "got 'avx1024'" in run.stderr
