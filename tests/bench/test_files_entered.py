"""What a reader has to open who follows a gradient from the loader to a score."""

from __future__ import annotations

import pytest

import files_entered

MOST = 14


@pytest.mark.parametrize("call", ["fit", "attribute", "attribute, top_k"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_batch_goes_through_few_files(call, on_disk, tmp_path):
    found = files_entered.calls(str(tmp_path / "store") if on_disk else None)[call]
    # The store's format is a file more, of those that a reader of the formula does not open.
    assert len(found) <= MOST + on_disk, sorted(found)
