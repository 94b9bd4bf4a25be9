"""Names that users import: none disappears, and each is where it was."""

from __future__ import annotations

import importlib

import pytest

NAMES = {
    "trak_ext.evaluation": {
        "LDS", "Brittleness", "LDSDifference", "LeaveOneOut", "MislabelAUC",
        "counterfactual_brittleness", "flip_labels", "lds", "lds_difference",
        "leave_one_out_changes", "leave_one_out_correlation", "mislabel_auc",
    },
    "trak_ext.baselines": {
        "Baseline", "GradientBaseline", "GradientCosine", "GradientProduct", "Random",
        "RepresentationSimilarity", "TracIn",
    },
    "trak_ext.report": {
        "Attributions", "BundleError", "Item", "LDSSummary", "load_bundle", "render",
        "save_bundle", "write_report",
    },
}  # fmt: skip


@pytest.mark.parametrize("package", NAMES)
def test_public_names_are_importable(package):
    module = importlib.import_module(package)
    assert set(module.__all__) == NAMES[package]
    assert NAMES[package] <= set(dir(module))
    for name in NAMES[package]:
        assert getattr(module, name).__doc__
        assert getattr(module, name).__module__.startswith(f"{package}.")
