"""Runs of `fit` that are killed at chosen moments, each in a fork of one Python process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

import trak_ext
from trak_ext import Attributor

ROWS, NUM_TRAIN, PROJ_DIM, BATCH = 8, 21, 6, 5
TASK = "image_classification"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
        )  # fmt: skip
        self.calls = Calls()

    def forward(self, x):
        self.calls.count += 1
        return self.layers(x)


class Calls:
    """A count that a model does not get back as it was."""

    count = 0


def setting():
    """A model, two checkpoints of it and training data, always the same."""
    torch.manual_seed(5)
    model = Net()
    states = [{name: t.clone() for name, t in Net().state_dict().items()} for _ in range(2)]
    return model, states, (torch.randn(NUM_TRAIN, 4), torch.randint(0, 3, (NUM_TRAIN,)))


def batches(data, size=BATCH):
    return list(zip(*(tensor.split(size) for tensor in data), strict=True))


def attributor(store, model=None, task=TASK, **options):
    first, states, _ = setting()
    options = {"checkpoints": states, "proj_dim": PROJ_DIM, "progress": False, **options}
    return Attributor(first if model is None else model, task, store=store, **options)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """A loader that kills the process in place of its batch number `fatal`, over all passes."""

    def __init__(self, data, fatal):
        self.batches, self.left = batches(data), fatal

    def __iter__(self):
        for batch in self.batches:
            if self.left == 0:
                die()
            self.left -= 1
            yield batch


def _is_record(path):
    return path.endswith(".tmp") and "owner.json" not in path


def kill_in(name, fatal):
    """Let call number `fatal` of a function of os on a file kill the process."""
    original, left = getattr(os, name), [fatal]

    def deadly(*args, **kwargs):
        if name == "fsync" and _is_record(os.readlink(f"/proc/self/fd/{args[0]}")):
            left[0] -= 1
            if left[0] < 0:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                die()
        result = original(*args, **kwargs)
        if name == "replace":
            left[0] -= 1
            if left[0] < 0:
                die()
        return result

    setattr(os, name, deadly)


LOOKS = 2  # at the first batch, before the first pass

# Files are written in this order: manifest, probe, three shards and the summary of checkpoint 0,
# the manifest that vouches for it, the same of checkpoint 1, two kernels.
MOMENTS = {
    "before anything": ("loader", 0),
    "in the first shard": ("loader", LOOKS + 1),
    "in the second shard": ("loader", LOOKS + 3),
    "in checkpoint 1": ("loader", LOOKS + 8),
    "writing the manifest": ("fsync", 0),
    "writing the probe": ("fsync", 1),
    "writing a shard": ("fsync", 3),
    "writing a checkpoint summary": ("fsync", 5),
    "vouching for a checkpoint summary": ("fsync", 6),
    "writing a shard of checkpoint 1": ("fsync", 9),
    "writing a kernel": ("fsync", 13),
    "after the manifest": ("replace", 0),
    "after the last shard of checkpoint 0": ("replace", 4),
    "after the summary of checkpoint 0": ("replace", 5),
    "after the last file": ("replace", 14),
}
FILES_LEFT = [0, 2, 3, 8, 0, 1, 3, 5, 6, 8, 11, 1, 5, 6, 13]  # without the owner's


# With a journal after every chunk there are more files, each written many times.
CHUNK = 3
JOURNAL_MOMENTS = {f"after rename {i}": ("replace", i) for i in range(0, 30, 2)}
JOURNAL_MOMENTS |= {f"writing file {i}": ("fsync", i) for i in range(1, 30, 5)}


def victim(store, where, fatal, **options):
    data = setting()[2]
    if where == "loader":
        attributor(store, **options).fit(Deadly(data, fatal))
    else:
        kill_in(where, fatal)
        attributor(store, **options).fit(batches(data))


def main_with_journals(folder):
    """As `main`, with a journal that is written after every chunk of 3 samples."""
    trak_ext.attribution.fitting.JOURNAL_SECONDS = 0
    main(folder, JOURNAL_MOMENTS, chunk_size=CHUNK)


def main(folder, moments=MOMENTS, **options):
    """Fork a victim for every moment, one after the other, and say how each ended."""
    import torch._dynamo  # torch.func would, in every child anew

    torch.set_num_threads(1)
    trak_ext.store.base.shard_rows = lambda proj_dim: ROWS
    for i, (where, fatal) in enumerate(moments.values()):
        child = os.fork()
        if child == 0:
            try:
                victim(Path(folder) / str(i), where, fatal, **options)
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
