"""bench/cost_per_sample.py in small."""

from __future__ import annotations

import shutil

import pytest
import torch

import cost_per_sample


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def args():
    words = (
        "--params 1000 2000 --proj-dims 64 512 --batches 1 3 --normal-params 2000 "
        "--normal-proj-dims 64 --most-work 2000000 --repeats 1"
    )
    return cost_per_sample.parse(words.split())


def test_projections(args):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    rows = cost_per_sample.measure_projections(args)
    sizes = {(row["kind"], row["params"], row["proj_dim"], row["batch"]) for row in rows}
    assert len(sizes) == len(rows)
    assert {size[1:] for size in sizes if size[0] == "sjlt"} == {
        (params, proj_dim, batch)
        for params in (1000, 2000)
        for proj_dim in (64, 512)
        for batch in (1, 3)
    }
    assert {size[1:] for size in sizes if size[0] == "normal"} == {(2000, 64, 1), (2000, 64, 3)}
    assert ("rademacher", 2000, 512, 1) in sizes
    assert ("rademacher", 2000, 512, 3) not in sizes
    for row in rows:
        assert row["share_of_best"] > 0
        per_sample = 1e6 * row["seconds"][0] / row["batch"]
        assert row["microseconds_per_sample"] == pytest.approx(per_sample)
    lines = cost_per_sample.projection_table(rows, args.batches)
    assert [line[:3] for line in lines[:2]] == [
        ["rademacher", "1,000", "64"],
        ["rademacher", "1,000", "512"],
    ]
    assert lines[3][4] == ""  # left out
    assert len(lines) == 4 + 4 + 1


def test_fit():
    rows = cost_per_sample.measure_fit([20, 40], 16, 1)
    assert [row["samples"] for row in rows] == [20, 40]
    lines = cost_per_sample.fit_table(rows)
    assert lines[1][3] == "1.00"
    assert all(row["microseconds_per_sample"] > 0 for row in rows)


def test_samples_of_fit_are_all_there():
    batches = cost_per_sample.fit_batches(1200)
    assert [len(labels) for _, labels in batches] == [500, 500, 200]
