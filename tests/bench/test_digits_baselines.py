"""The gate: TRAK beats every baseline on digits, for an MLP, a deeper one and a CNN, at M = 10.

bench/digits_baselines.py with fewer subsets and networks: 30 halves, 2 networks each, 100 targets.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def bench():
    import digits_baselines

    return digits_baselines


@pytest.mark.parametrize("network", ["mlp", "mlp3", "cnn"])
def test_trak_beats_every_baseline(bench, network):
    arguments = "--num-test 100 --subsets 30 --models-a-subset 2 --checkpoints 10 --threads 1"
    settings = bench.parse(arguments.split(" "))
    rows = {row["method"]: row for row in bench.measure(network, settings)}
    trak = rows.pop("TRAK")
    assert len(rows) == 7
    for name, row in rows.items():
        assert row["difference"] == pytest.approx(trak["lds"] - row["lds"], abs=1e-9)
        assert row["difference_targets"][0] > 0, name
        assert row["difference_subsets"][0] > 0, name
    assert abs(rows["random"]["lds"]) < 0.06
