"""Writes law_v1.json and sjlt_features_v1.json beside this file from the NumPy oracle.

Run it only when the law's version number changes: these digests are what a version means.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

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

SJLT_CASES = [
    {"num_params": 400, "proj_dim": 24, "nnz": 1, "seed": 0, "model_id": 0, "param_offset": 0},
    {"num_params": 300, "proj_dim": 1, "nnz": 1, "seed": 1, "model_id": 2, "param_offset": 5},
    {"num_params": 300, "proj_dim": 36, "nnz": 4, "seed": 2**32, "model_id": 1, "param_offset": 77},
    {
        "num_params": 500,
        "proj_dim": 200,
        "nnz": 2,
        "seed": 2**64 - 1,
        "model_id": 2**32 - 1,
        "param_offset": 2**39 - 250,
    },
    {"num_params": 260, "proj_dim": 3, "nnz": 3, "seed": 7, "model_id": 3, "param_offset": 2**62},
]
# Long enough for two and three levels of the tree.
SJLT_FEATURES = [
    {"num_params": 9000, "proj_dim": 24, "nnz": 2, "seed": 3, "model_id": 1, "param_offset": 1000},
    {"num_params": 20000, "proj_dim": 3, "nnz": 1, "seed": 2**63, "model_id": 0, "param_offset": 7},
    {"num_params": 70000, "proj_dim": 512, "nnz": 1, "seed": 9, "model_id": 4, "param_offset": 64},
]
FEATURE_ROWS = 2


def feature_gradients(num_params: int) -> np.ndarray:
    """Return gradients [2, P] from the law itself, of wide range, whose sum shows its order."""
    normal = reference.projection_matrix(num_params, 3 * FEATURE_ROWS, kind="normal", seed=11).T
    a, b, c = normal.reshape(3, FEATURE_ROWS, num_params)
    grads: np.ndarray = a * b**3 * (c**3 + np.float32(0.1))
    return grads


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
    for case in SJLT_CASES:
        matrix = reference.projection_matrix(kind="sjlt", **case)
        vectors.append(
            {
                **case,
                "kind": "sjlt",
                "first_row": [float(value) for value in matrix[0, :6]],
                "sha256": hashlib.sha256(matrix.astype("<f4").tobytes()).hexdigest(),
            }
        )
    path = Path(__file__).with_name(f"law_v{reference.LAW_VERSION}.json")
    path.write_text(json.dumps(vectors, indent=1) + "\n")
    features = []
    for case in SJLT_FEATURES:
        law = {key: value for key, value in case.items() if key != "num_params"}
        found = reference.project_sjlt(feature_gradients(case["num_params"]), **law)
        features.append(
            {
                **case,
                "first_row": [float(value) for value in found[0, :6]],
                "sha256": hashlib.sha256(found.astype("<f4").tobytes()).hexdigest(),
            }
        )
    path = Path(__file__).with_name(f"sjlt_features_v{reference.LAW_VERSION}.json")
    path.write_text(json.dumps(features, indent=1) + "\n")
