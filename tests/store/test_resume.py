"""A killed run resumes and equals one that was not; what does not belong together is refused.

The victims are forked from one Python process of their own and killed by SIGKILL at chosen moments.
"""

from __future__ import annotations

import re
import shutil
import signal

import pytest
import torch

import trak_ext
from children import run_python
from folders import HELPERS
from trak_ext import StoreError
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import TASKS, Task
from victims import FILES_LEFT, MOMENTS, NUM_TRAIN, ROWS, TASK, Net, attributor, batches, setting


@pytest.fixture(scope="module")
def graveyard(tmp_path_factory):
    """Stores left behind by victims, by moment."""
    folder = tmp_path_factory.mktemp("victims")
    code = "import sys, victims; victims.main(sys.argv[1])"
    run = run_python(code, str(folder), PYTHONPATH=str(HELPERS))
    assert run.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS), run.stderr
    return {moment: folder / str(i) for i, moment in enumerate(MOMENTS)}


@pytest.fixture
def left_behind(graveyard, tmp_path):
    """Copies what the victim of a moment left behind."""

    def copy(moment):
        path = tmp_path / "left behind"
        if graveyard[moment].exists():
            shutil.copytree(graveyard[moment], path)
        return path

    return copy


@pytest.fixture(autouse=True)
def _as_the_victims(monkeypatch):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fitted(tmp_path):
    """A finished store."""
    attributor(tmp_path / "store").fit(batches(setting()[2]))
    return tmp_path / "store"


def names_in(path):
    """The files of a store; a killed run's owner file goes with the next run, whatever it does."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if file.name != "owner.json")


def contents(path):
    return {name: (path / name).read_bytes() for name in names_in(path)}


def assert_equal_stores(path, expected):
    assert names_in(path) == names_in(expected)
    assert contents(path) == contents(expected)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(
    moment, left_behind, fitted, monkeypatch
):
    # What a checkpoint's first samples are computed again for is not counted.
    monkeypatch.setattr(GradientComputer, "_probe", lambda *_: None)
    monkeypatch.setattr(trak_ext.attribution.probe, "check", lambda *_: None)
    path = left_behind(moment)
    left = [name for name in names_in(path) if not name.endswith(".tmp")] if path.exists() else []
    assert len(left) == FILES_LEFT[list(MOMENTS).index(moment)]
    if MOMENTS[moment][0] == "fsync":
        assert list(path.rglob("*.tmp"))
    if len(left) < 11:
        with pytest.raises(StoreError, match=r"Attributor is not fitted"):
            attributor(path).attribute(batches(setting()[2]))
    whole_ones = [name for name in left if name != "manifest.json"]
    before = {name: (path / name).read_bytes() for name in whole_ones}

    model = Net()
    resumed = attributor(path, model)
    data = setting()[2]
    resumed.fit(batches(data))
    # Nothing that was whole is written or computed again: 2 calls a shard of 8 (5 + 3 samples,
    # 2 + 5 + 1, 4 + 1).
    assert {name: (path / name).read_bytes() for name in whole_ones} == before
    assert not (path / "owner.json").exists()
    whole = attributor(None, Net())
    whole.fit(batches(data))
    calls = {"000000000000": 2, "000000000008": 3, "000000000016": 2}
    kept = sum(calls[name.split("-")[-1].split(".")[0]] for name in left if "features" in name)
    assert model.calls.count == whole._model.calls.count - kept
    assert_equal_stores(path, fitted)
    scores = attributor(path).attribute(batches(data))
    assert torch.equal(scores, attributor(fitted).attribute(batches(data)))


@pytest.mark.parametrize("size", [1, 8, 21])
def test_a_run_may_resume_with_another_batch_size(left_behind, size, fitted):
    path = left_behind("writing a checkpoint summary")
    data = setting()[2]
    resumed = attributor(path)
    resumed.fit(batches(data, size))
    scores, expected = (attributor(p).attribute([data]) for p in (path, fitted))
    assert float((scores - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# --- what is refused ------------------------------------------------------------------------------


def other_data():
    (x, y) = setting()[2]
    one_bit = x.clone()
    one_bit.view(torch.int32)[-1, -1] ^= 1
    label = y.clone()
    label[0] = (label[0] + 1) % 3
    swapped = torch.arange(NUM_TRAIN)
    swapped[[2, 3]] = swapped[[3, 2]]
    return {
        "one bit of the last sample": (one_bit, y),
        "a label": (x, label),
        "order": (x.flip(0), y.flip(0)),
        "two samples swapped": (x[swapped], y[swapped]),
        "dtype of labels": (x, y.to(torch.int32)),
    }


@pytest.mark.parametrize("change", other_data())
def test_other_data_are_refused_and_nothing_is_written(fitted, change):
    before = contents(fitted)
    with pytest.raises(StoreError, match=r"other data in samples \d+ to \d+") as error:
        attributor(fitted).fit(batches(other_data()[change]))
    assert "\n" not in str(error.value)
    assert contents(fitted) == before


@pytest.mark.parametrize("count", [0, 1, 7, 8, 16, 20, 22, 24, 25, 40])
@pytest.mark.parametrize("moment", ["finished", "after the last shard of checkpoint 0",
                                    "after the summary of checkpoint 0"])  # fmt: skip
def test_another_number_of_samples_is_refused(fitted, left_behind, count, moment):
    path = fitted if moment == "finished" else left_behind(moment)
    data = [torch.cat([tensor] * 2)[:count] for tensor in setting()[2]]
    before = contents(path)
    with pytest.raises(StoreError, match=r"^train_loader: expected .* samples .* got ") as error:
        attributor(path).fit(batches(data))
    assert "\n" not in str(error.value)
    assert contents(path) == before


def changed_weights():
    _, states, _ = setting()
    states[1]["layers.3.bias"] = states[1]["layers.3.bias"] + 1e-6
    return {"checkpoints": states}


def changed_running_mean():
    _, states, _ = setting()
    states[0]["layers.1.running_mean"] = states[0]["layers.1.running_mean"] + 1
    return {"checkpoints": states}


OTHERS = {
    "weights": (changed_weights, "checkpoints"),
    "running figures": (changed_running_mean, "checkpoints"),
    "order of checkpoints": (lambda: {"checkpoints": setting()[1][::-1]}, "checkpoints"),
    "another first checkpoint": (lambda: {"checkpoints": setting()[1][1:]}, "checkpoints"),
    "blocks": (lambda: {"blocks": 2}, "blocks"),
    "seed": (lambda: {"seed": 1}, "seed"),
    "kind": (lambda: {"kind": "normal"}, "kind"),
    "proj_dim": (lambda: {"proj_dim": 7}, "proj_dim"),
    "precision": (lambda: {"precision": "highest"}, "precision"),
    "params": (lambda: {"params": "layers.3.*"}, "params"),
    "task": (lambda: {"task": "text_classification"}, "task"),
    "own task": (lambda: {"task": Task("mine", TASKS[TASK].function)}, "task"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(
    "moment", ["finished", "writing a checkpoint summary", "after the manifest"]
)
def test_other_settings_are_refused_and_nothing_is_written(fitted, left_behind, other, moment):
    path = fitted if moment == "finished" else left_behind(moment)
    options, key = OTHERS[other]
    changed = attributor(path, **options())
    before = contents(path)
    for use in (changed.fit, changed.attribute):
        with pytest.raises(StoreError, match=rf"^store: expected one made with {key} = ") as error:
            use(batches(setting()[2]))
        assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match=rf"^store: expected one made with {key} = "):
        changed.self_influence()
    assert contents(path) == before


def test_a_task_of_the_same_name_is_the_same_task(fitted):
    same = attributor(fitted, task=Task(TASK, TASKS[TASK].function))
    same.fit(batches(setting()[2]))
    assert same.attribute(batches(setting()[2])).shape == (NUM_TRAIN, NUM_TRAIN)


# --- what is damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-0000/features-000000000008",
        "checkpoint-0001/finished",
        "checkpoint-0001/kernel-mean-0002",
    ],
)
def test_a_damaged_file_is_rejected_by_name_and_made_again_once_deleted(
    fitted, damage, name, tmp_path
):
    file = fitted / f"{name}.safetensors"
    data = setting()[2]
    expected = attributor(fitted).attribute(batches(data))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 0x10
    file.write_bytes({"cut": whole[:-1], "empty": b"", "flipped": bytes(flipped)}[damage])
    before = contents(fitted)
    calls = [
        lambda: attributor(fitted).fit(batches(data)),
        lambda: attributor(fitted).attribute(batches(data)),
        lambda: attributor(fitted).attribute(batches(data), top_k=2),
        lambda: attributor(fitted).self_influence(),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=re.escape(str(file))):
            call()
    assert contents(fitted) == before
    file.unlink()
    attributor(fitted).fit(batches(data))
    attributor(tmp_path / "fresh").fit(batches(data))
    assert_equal_stores(fitted, tmp_path / "fresh")
    assert torch.equal(attributor(fitted).attribute(batches(data)), expected)


def test_a_missing_shard_is_named(fitted):
    (fitted / "checkpoint-0001" / "features-000000000008.safetensors").unlink()
    sentence = r"expected the file .*checkpoint-0001/features-000000000008.*, got none"
    with pytest.raises(StoreError, match=sentence):
        attributor(fitted).attribute(batches(setting()[2]))


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_deleted_shard_is_not_made_again_from_other_data(tmp_path, checkpoints):
    x, y = setting()[2]
    states = setting()[1][:checkpoints]
    attributor(tmp_path, checkpoints=states).fit(batches((x, y)))
    for m in range(checkpoints):
        (tmp_path / f"checkpoint-{m:04d}" / "features-000000000008.safetensors").unlink()
    before = contents(tmp_path)
    other = x.clone()
    other[9] += 1  # the checkpoint summary knows of the sample as it was
    with pytest.raises(ValueError, match="other data"):
        attributor(tmp_path, checkpoints=states).fit(batches((other, y)))
    assert contents(tmp_path) == before


# --- gradients with NaN or Inf ----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_samples_with_nan_or_inf_are_named_and_not_written(tmp_path, value, chunk_size):
    x, y = setting()[2]
    bad = x.clone()
    bad[[1, 6], [0, 3]] = value
    path = tmp_path / "store"
    with pytest.raises(ValueError, match=r"^train_loader: .*NaN or Inf for 2 of them: 1, 6$"):
        attributor(path, chunk_size=chunk_size).fit(batches((bad, y)))
    assert not path.exists()


def test_not_finite_in_a_later_shard_and_a_fit_without_it(tmp_path, fitted):
    x, y = setting()[2]
    bad = x.clone()
    bad[[17, 20]] = float("nan")
    path = tmp_path / "other"
    with pytest.raises(ValueError, match=r"NaN or Inf for 2 of them: 17, 20$"):
        attributor(path).fit(batches((bad, y)))
    assert not path.exists() or not list(path.rglob("features-000000000016*"))
    with pytest.raises(StoreError, match="fit"):
        attributor(path).attribute(batches((x, y)))
    attributor(path).fit(batches((x, y)))
    assert_equal_stores(path, fitted)


def test_many_samples_with_nan_or_inf_make_one_short_sentence(monkeypatch):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: 1000)
    x, y = torch.full((100, 4), float("nan")), torch.zeros(100, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"for 100 of them: 0, 1, 2, .*\.\.\.$") as error:
        attributor(None).fit([(x, y)])
    assert len(str(error.value)) < 200


def test_targets_with_nan_or_inf_are_named(fitted):
    x, y = setting()[2]
    bad = x[:12].clone()
    bad[11] = float("nan")
    with pytest.raises(ValueError, match=r"^test_loader: .*NaN or Inf for 1 of them: 11$"):
        attributor(fitted).attribute(batches((bad, y[:12])))
