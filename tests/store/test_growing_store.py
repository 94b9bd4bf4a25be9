"""Training samples and checkpoints that are added to a fitted store, and ids of samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trak_ext import Attributor, StoreError

NUM_TRAIN, PROJ_DIM = 23, 6


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    states = [{n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(3)]
    train = (torch.randn(NUM_TRAIN, 4), torch.randint(0, 3, (NUM_TRAIN,)))
    test = (torch.randn(5, 4), torch.randint(0, 3, (5,)))
    return model, states, train, test


def cut(data, start, stop):
    return [tuple(tensor[start:stop] for tensor in data)]


def attributor(store=None, checkpoints=2, **options):
    model, states, _, _ = setting()
    return Attributor(
        model, "image_classification", checkpoints=states[:checkpoints], store=store,
        proj_dim=PROJ_DIM, progress=False, **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: 8)


def contents(path):
    return {str(file): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_close(a, b):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_part_is_another_name_of_addition():
    _, _, train, test = setting()
    named, renamed = attributor(), attributor()
    for at, (start, stop) in enumerate([(0, 10), (10, 23)]):
        named.fit(cut(train, start, stop), addition=at)
        renamed.fit(cut(train, start, stop), part=at)
    assert torch.equal(named.attribute([test]), renamed.attribute([test]))
    with pytest.raises(ValueError, match=r"^part: expected addition or part, got both: 1 and 2$"):
        named.fit(cut(train, 10, 23), addition=1, part=2)
    with pytest.raises(TypeError, match=r"^addition: expected an integer, got 'one'$"):
        named.fit(cut(train, 10, 23), part="one")


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("ends", [(10, 23), (8, 16, 23), (8, 8, 23), (23, 23)])
@pytest.mark.parametrize("options", [{}, {"curvature": None, "leverage": True, "blocks": 2}])
def test_added_samples_score_as_if_they_had_been_there(where, ends, options, tmp_path):
    _, _, train, test = setting()
    whole = attributor(**options)
    whole.fit([train])
    grown = attributor(tmp_path / "store" if where == "folder" else None, **options)
    start = 0
    for part, stop in enumerate(ends):
        grown.fit(cut(train, start, stop), addition=part)
        start = stop
    if where == "folder":
        grown = attributor(tmp_path / "store", **options)
    assert_close(grown.attribute([test]), whole.attribute([test]))
    assert_close(grown.self_influence(), whole.self_influence())
    best, expected = (a.attribute([test], top_k=9) for a in (grown, whole))
    assert torch.equal(best.indices, expected.indices)
    assert_close(best.values, expected.values)


def test_fitting_parts_again_changes_nothing(tmp_path):
    _, _, train, _ = setting()
    for _ in range(2):
        attributor(tmp_path).fit(cut(train, 0, 10))
        attributor(tmp_path).fit(cut(train, 10, 23), addition=1)
        before = contents(tmp_path)
    assert contents(tmp_path) == before
    assert any("part-0001" in name for name in before)


def test_a_part_of_other_data_or_out_of_order_is_refused(tmp_path):
    _, _, train, _ = setting()
    with pytest.raises(StoreError, match=r"^Attributor is not fitted: call fit\(\) first$"):
        attributor(tmp_path).fit(cut(train, 10, 23), addition=1)
    attributor(tmp_path).fit(cut(train, 0, 10))
    with pytest.raises(
        StoreError, match=r"^Attributor is not fitted: call fit\(addition=1\) first$"
    ):
        attributor(tmp_path).fit(cut(train, 10, 23), addition=2)
    attributor(tmp_path).fit(cut(train, 10, 23), addition=1)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="other data in samples 0 to 7"):
        attributor(tmp_path).fit(cut(train, 9, 22), addition=1)
    with pytest.raises(StoreError, match=r"^train_loader: expected 13 samples"):
        attributor(tmp_path).fit(cut(train, 10, 22), addition=1)
    with pytest.raises(StoreError, match=r"^train_loader: expected 10 samples"):
        attributor(tmp_path).fit(cut(train, 0, 9))
    with pytest.raises(ValueError, match=r"^addition: expected an integer from 0"):
        attributor(tmp_path).fit(cut(train, 0, 9), addition=-1)
    assert contents(tmp_path) == before


def test_a_part_that_was_cut_short_is_refused_and_resumes(tmp_path):
    _, _, train, test = setting()
    attributor(tmp_path).fit(cut(train, 0, 10))

    class Failing:
        """Brings the samples of the first checkpoint's pass, and fails in the second."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from cut(train, 10, 18)
            if self.passes == 2 + 2:  # two looks at the first batch come before
                raise OSError("gone")
            yield from cut(train, 18, 23)

    with pytest.raises(OSError, match="gone"):
        attributor(tmp_path).fit(Failing(), addition=1)
    sentence = r"call fit\(addition=1\) first \(the store has no .* of checkpoint 1"
    with pytest.raises(StoreError, match=sentence):
        attributor(tmp_path).attribute([test])
    attributor(tmp_path).fit(cut(train, 10, 23), addition=1)
    whole = attributor()
    whole.fit([train])
    assert_close(attributor(tmp_path).attribute([test]), whole.attribute([test]))


@pytest.mark.parametrize("parts", [1, 2])
def test_checkpoints_may_be_added(tmp_path, parts):
    _, _, train, test = setting()
    ends = [0, 10, 23] if parts == 2 else [0, 23]
    for checkpoints in (1, 3, 2):
        grown = attributor(tmp_path, checkpoints)
        before = contents(tmp_path)
        for part in range(parts):
            grown.fit(cut(train, ends[part], ends[part + 1]), addition=part)
        kept = {name: data for name, data in contents(tmp_path).items() if name in before}
        assert {n: d for n, d in kept.items() if "manifest" not in n} == {
            n: d for n, d in before.items() if "manifest" not in n
        }
        whole = attributor(None, checkpoints)
        whole.fit([train])
        for attribution in (grown, attributor(tmp_path, checkpoints)):
            assert_close(attribution.attribute([test]), whole.attribute([test]))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{m:04d}" for m in range(3)
    ]
    assert_close(attributor(tmp_path, 1).attribute([test]), one_checkpoint(train, test))


def one_checkpoint(train, test):
    single = attributor(None, 1)
    single.fit([train])
    return single.attribute([test])


def test_a_store_of_fewer_checkpoints_is_refused_before_fit(tmp_path):
    _, _, train, test = setting()
    attributor(tmp_path, 1).fit([train])
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"not fitted for all 2 checkpoints: .* of checkpoint 1"):
        attributor(tmp_path, 2).attribute([test])
    assert contents(tmp_path) == before


# --- ids ------------------------------------------------------------------------------------------


class Records(torch.utils.data.Dataset):
    """A dataset whose items are mappings with an id."""

    def __init__(self, data, ids):
        self.data, self.ids = data, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input": self.data[0][i], "labels": self.data[1][i], "sample_id": self.ids[i]}


IDS = {
    "strings": lambda n: [f"doc/{i:03d} é" for i in range(n)],
    "integers": lambda n: [10**12 + 7 * i for i in range(n)],
}


def loader(data, ids, size=5):
    return DataLoader(Records(data, ids), batch_size=size)


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_results_carry_the_ids_of_samples_and_targets(kind, where, tmp_path):
    _, _, train, test = setting()
    ids = IDS[kind](NUM_TRAIN)
    store = tmp_path if where == "folder" else None
    fitted = attributor(store)
    fitted.fit(loader(cut(train, 0, 10)[0], ids[:10]))
    fitted.fit(loader(cut(train, 10, 23)[0], ids[10:]), addition=1)
    if where == "folder":
        fitted = attributor(store)
    best = fitted.attribute(loader(test, ["a", "b", "c", "d", "e"], 2), top_k=3)
    plain = attributor()
    plain.fit([train])
    expected = plain.attribute([test], top_k=3)
    assert torch.equal(best.indices, expected.indices)
    assert best.ids == [[ids[i] for i in row] for row in expected.indices.tolist()]
    assert best.target_ids == ["a", "b", "c", "d", "e"]
    assert fitted.sample_ids() == ids
    assert expected.ids is None
    assert expected.target_ids is None
    assert plain.sample_ids() is None
    values, indices = best
    assert torch.equal(values, best.values)
    assert torch.equal(indices, best.indices)


def test_ids_are_part_of_the_data(tmp_path):
    _, _, train, _ = setting()
    ids = IDS["strings"](NUM_TRAIN)
    attributor(tmp_path).fit(loader(train, ids))
    attributor(tmp_path).fit(loader(train, ids, 8))
    ids[3], ids[4] = ids[4], ids[3]
    with pytest.raises(StoreError, match="other data in samples 0 to 7"):
        attributor(tmp_path).fit(loader(train, ids))
    with pytest.raises(StoreError, match="other data in samples 0 to 7"):
        attributor(tmp_path).fit([{"input": train[0], "labels": train[1]}])


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.zeros(23), r"^sample_id: expected strings or integers, got a float$"),
        ("abc", r"^sample_id: expected .*, got a str$"),
        ([1.5] * 23, r"^sample_id: expected strings or integers, got a float$"),
        ([1] * 22, r"^sample_id: expected 23 as the batch's samples, got 22$"),
    ],
)
def test_bad_ids(ids, sentence):
    _, _, (x, y), _ = setting()
    with pytest.raises((TypeError, ValueError), match=sentence):
        attributor().fit([{"input": x, "labels": y, "sample_id": ids}])


def test_ids_in_some_batches_alone_are_refused():
    _, _, (x, y), _ = setting()
    batch = {"input": x, "labels": y}
    with pytest.raises(ValueError, match=r"^sample_id: expected in every batch or in none"):
        attributor().fit([{**batch, "sample_id": list(range(23))}, batch])
