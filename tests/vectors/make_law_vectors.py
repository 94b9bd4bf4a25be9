"""Writes law_v1.json beside this file from the NumPy oracle.

Run it only when the law's version number changes: these digests are what a version means.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trak_ext import reference

CASES = [
    {"num_params": 300, "proj_dim": 40, "seed": 0, "model_id": 0, "param_offset": 0},
    {"num_params": 300, "proj_dim": 33, "seed": 1, "model_id": 0, "param_offset": 77},
    {"num_params": 200, "proj_dim": 40, "seed": 2**32, "model_id": 1, "param_offset": 0},
    {
        "num_params": 200,
        "proj_dim": 40,
        "seed": 2**64 - 1,
        "model_id": 2**32 - 1,
        "param_offset": 2**40 + 13,
    },
    {
        "num_params": 64,
        "proj_dim": 48,
        "seed": 0x0123456789ABCDEF,
        "model_id": 5,
        "param_offset": 2**34 - 6,
    },
    {"num_params": 260, "proj_dim": 20, "seed": 12345, "model_id": 3, "param_offset": 2**62},
]

if __name__ == "__main__":
    vectors = []
    for kind in ("rademacher", "normal"):
        for case in CASES:
            matrix = reference.projection_matrix(kind=kind, **case)
            vectors.append(
                {
                    **case,
                    "kind": kind,
                    "first_row": [float(value) for value in matrix[0, :6]],
                    "sha256": hashlib.sha256(matrix.astype("<f4").tobytes()).hexdigest(),
                }
            )
    path = Path(__file__).with_name(f"law_v{reference.LAW_VERSION}.json")
    path.write_text(json.dumps(vectors, indent=1) + "\n")
