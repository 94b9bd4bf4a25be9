"""The demonstration end to end, with the accuracy that it must reach."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from trak_ext import cli, report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    assert cli.main(["demo", "--out", str(out), "--quiet"]) == 0
    return out


def test_accuracy(folder):
    lds = json.loads((folder / "results.json").read_text())["lds"]
    assert set(lds) == {"trak_m1", "trak_m10", "grad_dot", "random"}
    assert lds["trak_m1"] >= 0.68
    assert lds["trak_m10"] >= 0.74
    assert lds["trak_m10"] - lds["grad_dot"] >= 0.28
    assert abs(lds["random"]) <= 0.04


def test_results_tell_how_they_came_about(folder):
    results = json.loads((folder / "results.json").read_text())
    assert all(seconds >= 0 for seconds in results["seconds"].values())
    assert {"train_subsets", "fit_trak_m10", "attribute_trak_m10"} <= set(results["seconds"])
    assert results["build"]["cpu_level"] in results["build"]["cpu_levels"]
    assert results["settings"]["test_accuracy"] > 0.9


def test_picture(folder):
    with Image.open(folder / "attributions.png") as picture:
        assert min(picture.size) > 800
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colours) > 50


def test_report_and_its_bundle(folder):
    lds = json.loads((folder / "results.json").read_text())["lds"]
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{lds['trak_m10']:.3f}" in html
    assert html.count("<article") == 40
    attributions = report.load_bundle(folder / "bundle")
    assert report.render(attributions) == html
    same = sum(
        attributions.train_items[index].label == target.label
        for target, row in zip(
            attributions.targets, attributions.proponents.indices.tolist(), strict=True
        )
        for index in row
    )
    assert same >= 0.6 * attributions.proponents.indices.numel()
