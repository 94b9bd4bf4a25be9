"""A NumPy matrix product in a process of its own, since OpenBLAS picks its kernels at start.

Run by scoring.py with OPENBLAS_CORETYPE set: makes its inputs, then for each line on stdin runs one
product [n, k] @ [k, t] and prints its seconds.
"""

from __future__ import annotations

import sys
import time

import numpy as np


def main() -> None:
    """Answer every line with the seconds of one product."""
    n, t, k = map(int, sys.argv[1:4])
    generator = np.random.default_rng(0)
    left = generator.standard_normal((n, k), np.float32)
    right = generator.standard_normal((k, t), np.float32)
    out = np.empty((n, t), np.float32)
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        np.matmul(left, right, out=out)
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
