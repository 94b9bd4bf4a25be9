"""trak_ext.report.Attributions asks for what is shown alone and refuses what does not fit."""

from __future__ import annotations

import math

import pytest
import torch

from reports import NUM_TRAIN, make_attributions, make_lds
from trak_ext import TopK, report


def test_only_items_that_are_shown_are_asked_for():
    asked = []

    def item(index):
        asked.append(index)
        return report.Item(label=index)

    values = torch.tensor([[2.0, 1.0], [3.0, 2.0]])
    found = make_attributions(
        2,
        proponents=TopK(values, torch.tensor([[4, 9], [9, 2]])),
        opponents=TopK(-values, torch.tensor([[4, 5], [1, 2]])),
        train_items=item,
    )
    assert sorted(asked) == asked == list(found.train_items) == [1, 2, 4, 5, 9]
    assert found.num_train is None


def test_a_sequence_tells_how_many_there_are_and_opponents_may_be_left_out():
    found = make_attributions(opponents=None)
    assert found.num_train == NUM_TRAIN
    assert found.opponents.indices.shape == (4, 0)


def test_several_lds_keep_their_order_and_nan_is_allowed():
    undefined = report.LDSSummary(math.nan, (math.nan, math.nan), (math.nan, math.nan))
    found = make_attributions(
        lds={"b": make_lds(0.5), "a": undefined}, target_lds=[0, math.nan, 1, -1]
    )
    assert list(found.lds) == ["b", "a"]
    assert found.lds["b"].interval_subsets == (0.45, 0.55)
    assert math.isnan(found.target_lds[1])


def test_ids_of_the_loaders_name_items_that_have_none():
    attributions = make_attributions()
    ranked = TopK(*attributions.proponents)
    ranked.ids = [[f"file {i}" for i in row] for row in ranked.indices.tolist()]
    ranked.target_ids = [7, 8, 9, 10]
    own = report.Item(label=0, id="its own name")
    train = [own if i % 2 else report.Item(torch.rand(8, 8), label=i) for i in range(NUM_TRAIN)]
    targets = [report.Item(torch.rand(8, 8)), own, report.Item(), report.Item(text="a")]
    found = make_attributions(targets=targets, train_items=train, proponents=ranked, opponents=None)
    assert [item.id for item in found.targets] == [7, "its own name", 9, 10]
    for index, item in found.train_items.items():
        assert item.id == ("its own name" if index % 2 else f"file {index}")
        assert item.label == (0 if index % 2 else index)
    assert targets[0].id is None  # the caller's items are left as they were
    assert torch.equal(found.targets[0].image, targets[0].image)


NAN = torch.full((4, 1), torch.nan)
ONE = torch.ones(4, 1)
INDEX = torch.zeros(4, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": []}, "targets: expected at least one Item, got none"),
        ({"targets": report.Item()}, "targets: expected a list of Items, got a Item"),
        ({"train_items": None}, "train_items: expected Items by position .* got None"),
        ({"target_lds": [None] * 4}, "target_lds: expected 4 correlations .* got a list"),
        ({"target_lds": 0.5}, "target_lds: expected 4 correlations .* got 0.5"),
        ({"targets": ["a"] * 4}, r"targets\[0\]: expected a trak_ext.report.Item, got 'a'"),
        ({"proponents": (ONE[:3], INDEX[:3])}, r"proponents: .* shape \[4, k\], got \[3, 1\]"),
        ({"opponents": (ONE, INDEX.expand(4, 2))}, r"opponents: .* got \[4, 1\] and \[4, 2\]"),
        ({"opponents": ONE}, r"opponents: expected \(values, indices\), got a torch.float32"),
        ({"opponents": (ONE, [1])}, "opponents: expected two tensors, got a list"),
        ({"proponents": (ONE, ONE)}, "proponents: expected int64 indices, got torch.float32"),
        ({"proponents": (NAN, INDEX)}, r"proponents\[0\]: expected finite values"),
        ({"opponents": (INDEX, INDEX)}, r"opponents\[0\]: expected a floating-point dtype"),
        ({"proponents": (ONE, INDEX + 30)}, r"indices in 0\.\.29, got 30"),
        ({"proponents": (ONE, INDEX - 1)}, r"indices in 0\.\.29, got -1"),
        ({"train_items": {}}, "train_items: expected an Item for every index shown, got none for"),
        ({"train_items": lambda i: i}, r"train_items\[\d+\]: expected a trak_ext.report.Item"),
        ({"num_train": -1}, "num_train: expected an integer of at least 0"),
        ({"title": None}, "title: expected a string, got None"),
        ({"note": 1}, "note: expected a string, got 1"),
        ({"lds": 0.7}, "lds: expected what trak_ext.evaluation.lds returns, .* got 0.7"),
        ({"target_lds": [0.1]}, "target_lds: expected 4 correlations .* got a list"),
        (
            {"target_lds": [0, 0, 2, 0]},
            r"target_lds: expected .* in \[-1, 1\], one per target, got a list",
        ),
        ({"settings": {"a": torch.ones(1)}}, "settings: expected what JSON can hold, got"),
        ({"settings": {"a": math.nan}}, "settings: expected what JSON can hold, got"),
        ({"settings": [1]}, "settings: expected a mapping, got a list"),
        ({"fingerprint": b"ab"}, "fingerprint: expected a string, got a bytes"),
        ({"damping": [0.1, -1.0]}, r"damping: .* \[M\] or \[M, blocks\].* got a list"),
        ({"damping": NAN}, "damping: expected finite numbers of at least 0"),
        ({"damping": 1.0}, "damping: expected finite numbers .* got 1.0"),
        ({"damping": "auto"}, "damping: expected finite numbers .* got 'auto'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_attributions(**changes)
