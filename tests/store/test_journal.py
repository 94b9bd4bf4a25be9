"""Between shards a journal is kept, so that little is lost, and the store comes out the same."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from torch import nn

import trak_ext
from children import run_python
from folders import HELPERS
from trak_ext import Attributor, StoreError
from trak_ext.gradients import GradientComputer
from victims import CHUNK, JOURNAL_MOMENTS, ROWS, Net, attributor, batches, setting

JOURNAL = "checkpoint-0000/journal-000000000008.safetensors"


@pytest.fixture(autouse=True)
def _as_the_victims(monkeypatch):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _always(monkeypatch):
    monkeypatch.setattr(trak_ext.attribution.fitting, "JOURNAL_SECONDS", 0)


def contents(path):
    files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    files.pop("owner.json", None)
    return files


@pytest.fixture(scope="module")
def graveyard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victims")
    code = "import sys, victims; victims.main_with_journals(sys.argv[1])"
    run = run_python(code, str(folder), PYTHONPATH=str(HELPERS))
    assert run.stdout.split() == [str(-signal.SIGKILL)] * len(JOURNAL_MOMENTS), run.stderr
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """What a run without journals writes."""
    path = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: ROWS)
        attributor(path, chunk_size=CHUNK).fit(batches(setting()[2]))
    return contents(path)


@pytest.mark.parametrize("moment", JOURNAL_MOMENTS)
def test_killed_runs_come_out_byte_for_byte(moment, graveyard, fitted, tmp_path):
    path = tmp_path / "store"
    left = graveyard / str(list(JOURNAL_MOMENTS).index(moment))
    if left.exists():
        shutil.copytree(left, path)
    attributor(path, chunk_size=CHUNK).fit(batches(setting()[2]))
    assert contents(path) == fitted


def test_the_victims_have_left_journals(graveyard):
    assert len({path.name for path in graveyard.rglob("*/journal-*.safetensors")}) == 3


class Stopped:
    """A loader that is stopped after some batches."""

    def __init__(self, data, after, error=KeyboardInterrupt):
        self.batches, self.after, self.error = batches(data), after, error

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == self.after:
                raise self.error
            yield batch


def test_ctrl_c_says_what_was_kept_and_the_rest_is_computed(tmp_path, fitted, monkeypatch):
    data = setting()[2]
    path = tmp_path / "store"
    sentence = (
        r"^fit: stopped; kept 15 samples of checkpoint 1 of 2 .*store' \(call fit again to go on"
    )
    with pytest.raises(KeyboardInterrupt, match=sentence):
        attributor(path, chunk_size=CHUNK).fit(Stopped(data, 3))
    assert (path / JOURNAL).exists()
    monkeypatch.setattr(GradientComputer, "_probe", lambda *_: None)
    model = Net()
    attributor(path, model, chunk_size=CHUNK, probe=False).fit(batches(data))
    # Batches of 5, shards of 8 and chunks of 3: samples 15 to 20 take 4 calls, all of them 10.
    assert model.calls.count == 4 + 10
    again = contents(path)
    assert set(again) == set(fitted)
    kept = [name for name in fitted if name.startswith("checkpoint-0000/")]
    assert all(again[name] == fitted[name] for name in kept if "kernel" not in name)


def test_a_run_that_is_given_no_chunk_size_takes_the_stores(tmp_path, fitted):
    with pytest.raises(KeyboardInterrupt):
        attributor(tmp_path, chunk_size=CHUNK).fit(Stopped(setting()[2], 3))
    attributor(tmp_path).fit(batches(setting()[2]))
    assert contents(tmp_path) == fitted


def test_ctrl_c_with_one_checkpoint_and_in_memory(tmp_path):
    x, y = setting()[2]
    options = {"checkpoints": setting()[1][:1], "chunk_size": CHUNK}
    with pytest.raises(KeyboardInterrupt, match=r"^fit: stopped; kept 5 samples and all before"):
        attributor(tmp_path, **options).fit(Stopped((x, y), 1))
    with pytest.raises(KeyboardInterrupt, match=r"^fit: stopped; nothing is kept in memory"):
        attributor(None, **options).fit(Stopped((x, y), 1))


@pytest.mark.parametrize(("seconds", "kept"), [(0, True), (3600, False)])
def test_journals_are_written_by_time_and_folded_into_the_shard(
    tmp_path, monkeypatch, seconds, kept
):
    monkeypatch.setattr(trak_ext.attribution.fitting, "JOURNAL_SECONDS", seconds)
    data, seen = setting()[2], []

    class Looking:
        def __iter__(self):
            for batch in batches(data):
                seen.append(sorted(path.name for path in tmp_path.rglob("journal-*")))
                yield batch

    attributor(tmp_path, chunk_size=CHUNK).fit(Looking())
    first, second, third = (f"journal-{i:012d}.safetensors" for i in (0, 8, 16))
    of_one = [[], [first], [second], [second], [third]]
    assert seen[2:] == (of_one * 2 if kept else [[]] * 10)  # after two looks at the first batch
    assert not list(tmp_path.rglob("journal-*"))


def test_at_most_a_minute_is_lost():
    assert trak_ext.attribution.fitting.JOURNAL_SECONDS <= 60


def stopped(path, after=3):
    with pytest.raises(KeyboardInterrupt):
        attributor(path, chunk_size=CHUNK).fit(Stopped(setting()[2], after))


def test_a_journal_of_other_data_is_refused_by_name(tmp_path):
    stopped(tmp_path)
    before = contents(tmp_path)
    x, y = setting()[2]
    other = x.clone()
    other[12] += 1
    with pytest.raises(StoreError, match=rf"other data in samples 8 to 14 of .*{JOURNAL}"):
        attributor(tmp_path, chunk_size=CHUNK).fit(batches((other, y)))
    with pytest.raises(StoreError, match=r"^train_loader: expected 15 or more samples .* got 12"):
        attributor(tmp_path, chunk_size=CHUNK).fit(batches((x[:12], y[:12])))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "moved"])
def test_a_damaged_journal_is_refused_by_name(tmp_path, damage, fitted):
    stopped(tmp_path)
    file = tmp_path / JOURNAL
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    moved = next(tmp_path.rglob("features-*")).read_bytes()
    file.write_bytes({"cut": whole[:-1], "flipped": bytes(flipped), "moved": moved}[damage])
    with pytest.raises(StoreError, match=JOURNAL):
        attributor(tmp_path, chunk_size=CHUNK).fit(batches(setting()[2]))
    file.unlink()
    attributor(tmp_path, chunk_size=CHUNK).fit(batches(setting()[2]))
    assert contents(tmp_path) == fitted


@pytest.mark.usefixtures("_always")
def test_what_was_refused_is_not_kept(tmp_path):
    x, y = setting()[2]
    bad = x.clone()
    bad[9] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf for 1 of them: 9"):
        attributor(tmp_path, chunk_size=2).fit(batches((bad, y)))
    assert not list(tmp_path.rglob("journal-*"))
    attributor(tmp_path, chunk_size=2).fit(batches((x, y)))


def test_an_error_of_the_loader_keeps_what_there_is(tmp_path):
    with pytest.raises(OSError, match="gone"):
        attributor(tmp_path, chunk_size=CHUNK).fit(Stopped(setting()[2], 3, OSError("gone")))
    assert (tmp_path / JOURNAL).exists()


# --- sample chunks whose size is chosen -----------------------------------------------------------


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.embed(tokens).tanh().mean(1))


def texts():
    generator = torch.Generator().manual_seed(1)
    for length in (3, 9, 4, 17, 9, 2):
        tokens = torch.randint(0, 11, (9, length), generator=generator)
        yield tokens, torch.randint(0, 3, (9,), generator=generator)


def test_chosen_chunks_are_the_same_after_an_interruption(tmp_path, monkeypatch):
    # Memory for a few samples, less for long texts than for short ones.
    monkeypatch.setattr(trak_ext.gradients.computer, "TINY", 0)
    monkeypatch.setattr(trak_ext.gradients.computer, "free_bytes", lambda device: 24000)
    torch.manual_seed(0)
    model, sizes = Texts(), []
    one = GradientComputer(model, trak_ext.tasks.TASKS["text_classification"])
    for batch in texts():
        sizes.append(len(next(iter(one({}, batch))).output))
    assert len(set(sizes)) > 2
    assert max(sizes) < 9

    def fit(path, loader):
        options = {"store": path, "proj_dim": 4, "progress": False}
        Attributor(model, "text_classification", **options).fit(loader)

    fit(tmp_path / "whole", list(texts()))
    for after in range(1, 6):

        class Some:
            def __iter__(self, after=after):
                for i, batch in enumerate(texts()):
                    if i == after:
                        raise KeyboardInterrupt
                    yield batch

        path = tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            fit(path, Some())
        monkeypatch.setattr(trak_ext.gradients.computer, "free_bytes", lambda device: 10**9)
        fit(path, list(texts()))  # the manifest knows what was free
        monkeypatch.setattr(trak_ext.gradients.computer, "free_bytes", lambda device: 24000)
        assert contents(path) == contents(tmp_path / "whole")


class Slow(nn.Module):
    """A model that vmap cannot take, so that its samples come one at a time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * (2.0 if float(x.sum()) > 0 else 1.0)


@pytest.mark.filterwarnings("ignore:trak_ext computes gradients one sample at a time")
def test_samples_one_at_a_time_come_in_short_chunks_whose_cut_does_not_matter(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda width: 96)
    torch.manual_seed(0)
    model, x, y = Slow(), torch.randn(100, 4), torch.arange(100) % 3
    task = trak_ext.tasks.TASKS["image_classification"]
    sizes = [len(chunk.output) for chunk in GradientComputer(model, task)({}, (x, y))]
    assert sizes == [16] * 6 + [4]

    def fit(path, loader):
        options = {"store": path, "proj_dim": 8, "progress": False}
        Attributor(model, "image_classification", **options).fit(loader)

    fit(tmp_path / "whole", [(x, y)])
    for after in (1, 3):  # chunks, of which the journal then has so many
        path, left = tmp_path / str(after), [after]

        def advance(self, samples, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("trak_ext.attribution.progress.Progress.advance", advance)
            patch.setattr("trak_ext.attribution.fitting.JOURNAL_SECONDS", 0)
            with pytest.raises(KeyboardInterrupt, match=rf"kept {16 * (after + 1)} samples"):
                fit(path, [(x, y)])
        fit(path, [(x[:50], y[:50]), (x[50:], y[50:])])
        assert contents(path) == contents(tmp_path / "whole")
