"""What a reader has to open who follows a gradient from the loader to a score."""

from __future__ import annotations

import pytest

import files_entered

MOST = 14


@pytest.mark.parametrize("call", ["fit", "attribute", "attribute, top_k"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_batch_goes_through_few_files(call, on_disk, tmp_path):
    batch, whole = files_entered.calls(str(tmp_path / "store") if on_disk else None)[call]
    # How a store writes its files is for a reader of the format.
    shown = [path for path in batch if not (on_disk and path.startswith("store/"))]
    assert len(shown) <= MOST, sorted(batch)
    assert batch.keys() <= whole.keys()
