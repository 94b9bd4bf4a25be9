"""Every CPU level and every way of projecting at the borders of its tiles, against the oracle."""

from __future__ import annotations

import pytest

import trak_ext
from children import run_python

# Rows around the row groups (8, 12, 64, 128), parameters around blocks (128) and chunks (256, 384),
# columns around vectors (4, 8, 16), tiles (32) and panels; every dtype takes its turn.
CHILD = """
import itertools, sys
import numpy as np, torch, trak_ext
from trak_ext import reference

assert trak_ext.build_info()["cpu_level"] == sys.argv[1]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 24, 25, 63, 64, 65, 127, 128, 129]
PARAMS = [1, 2, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 383, 384, 385, 640]
COLUMNS = [1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80]
OFFSETS = [0, 1, 127, 128, 2**40 + 50]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
generator = torch.Generator().manual_seed(3)
matrices = {
    (kind, offset): torch.from_numpy(
        reference.projection_matrix(640, 80, kind=kind, seed=8, model_id=2, param_offset=offset)
    ).double()
    for kind in ("rademacher", "normal") for offset in OFFSETS
}
cases = list(itertools.product(ROWS, PARAMS, COLUMNS))
order = torch.randperm(len(cases), generator=generator).tolist()[: int(sys.argv[2])]
# Each value of each axis comes up whatever the draw.
covering = [(ROWS[i % len(ROWS)], PARAMS[i % len(PARAMS)], COLUMNS[i % len(COLUMNS)])
            for i in range(len(ROWS) * 3)]
for i, (rows, params, columns) in enumerate(covering + [cases[i] for i in order]):
    grads = torch.randint(-20, 21, (rows, params), generator=generator).to(DTYPES[i % 4])
    offset = OFFSETS[i % len(OFFSETS)]
    for kind in ("rademacher", "normal"):
        exact = grads.double() @ matrices[kind, offset][:params, :columns]
        for precision in ("medium", "high"):
            got = trak_ext.project(grads, columns, kind=kind, seed=8, model_id=2,
                                   param_offset=offset, precision=precision).double()
            case = (kind, precision, rows, params, columns, offset, grads.dtype)
            if kind == "rademacher" and precision == "high":
                assert torch.equal(got, exact), case
            else:
                # Entries of medium err by half a unit of 2**-14 of their chunk's largest sum.
                relative = 2**-9 if precision == "medium" else 2**-20
                scale = grads.double().norm(dim=1, keepdim=True) * 7
                assert ((got - exact).abs() <= relative * scale).all(), case
print("ok")
"""


@pytest.mark.parametrize("level", trak_ext.build_info()["cpu_levels"])
def test_ragged_sizes(level):
    run = run_python(CHILD, level, "150", check=False, TRAK_EXT_CPU_LEVEL=level)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "ok"
