"""What is free, from the files Linux tells it in, and what a computation takes."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from children import run_python
from trak_ext.gradients import memory
from trak_ext.gradients.memory import (
    KeptHeap,
    PeakBytes,
    control_group_bytes,
    free_bytes,
    is_out_of_memory,
)

GIB = 2**30


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))


def test_version_2_groups_count_all_the_way_up(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": GIB,
            "sys/fs/cgroup/a/memory.max": 4 * GIB,
            "sys/fs/cgroup/a/memory.current": 3 * GIB,
            "sys/fs/cgroup/a/memory.stat": f"anon 7\ninactive_file {GIB // 2}\nfile 9\n",
        },
    )
    assert list(control_group_bytes(tmp_path)) == [3 * GIB // 2]


def test_version_1_groups(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 2 * GIB,
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
        },
    )
    assert list(control_group_bytes(tmp_path)) == [GIB]


def test_a_container_sees_its_group_as_the_root(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/1f2e\n",
            "sys/fs/cgroup/memory.max": 3 * GIB,
            "sys/fs/cgroup/memory.current": GIB,
        },
    )
    assert list(control_group_bytes(tmp_path)) == [2 * GIB]


def test_without_the_files_nothing_is_known(tmp_path):
    assert list(control_group_bytes(tmp_path)) == []
    assert memory.available_bytes(tmp_path) is None
    assert memory.address_space_bytes(tmp_path) is None


def test_the_least_counts(monkeypatch):
    def say(available, groups, address_space):
        monkeypatch.setattr(memory, "available_bytes", lambda: available)
        monkeypatch.setattr(memory, "control_group_bytes", lambda: iter(groups))
        monkeypatch.setattr(memory, "address_space_bytes", lambda: address_space)
        return free_bytes(torch.device("cpu"))

    assert say(5, [9, 4], 7) == 4
    assert say(5, [], None) == 5
    assert say(5, [9], 3) == 3
    assert say(5, [-8], None) == 0
    assert say(None, [], None) is None


def test_devices_that_tell_nothing():
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.skipif(free_bytes(torch.device("cpu")) is None, reason="the system tells nothing")
def test_this_machine():
    assert 0 < free_bytes(torch.device("cpu")) < 2**50


LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
import torch
from trak_ext.gradients.memory import free_bytes, is_out_of_memory
free = free_bytes(torch.device("cpu"))
assert (64 << 20) < free < (2 << 30), free
kept = torch.empty(free // 2, dtype=torch.int8)
assert free_bytes(torch.device("cpu")) <= free // 2 + (1 << 20)
try:
    torch.empty(free, dtype=torch.int8)
except RuntimeError as error:
    assert is_out_of_memory(error), error
else:
    raise AssertionError("more than is free was given out")
"""


@pytest.mark.skipif(memory.available_bytes() is None, reason="needs Linux")
def test_a_limit_of_the_address_space_is_seen():
    run_python(LIMIT, OMP_NUM_THREADS="1")


def test_errors_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_peak_of_what_is_held_at_one_time():
    given = torch.ones(1000)
    with PeakBytes() as memory_used:
        first = given * 2  # 4000 bytes
        view = first[10:]
        same = given.view(10, 100)
        second = first + 1  # 8000
        del first
        third = second * 2  # 12000: the view keeps `first`
        del view, second
        fourth = third + 1  # 8000
    assert memory_used.peak == 12000
    assert same.shape == (10, 100)
    del third, fourth
    assert memory_used._held == 0


def test_peak_sees_through_vmap_and_grad():
    weight = torch.randn(50, 50)

    def loss(weight, x):
        return torch.tanh(weight @ x).sum()

    with PeakBytes() as memory_used:
        torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, torch.randn(8, 50))
    assert 8 * 2500 * 4 <= memory_used.peak < 3 * 8 * 2500 * 4


RESIDENT = """
import json
import torch
from trak_ext.gradients.memory import KeptHeap

def resident():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

def take_and_give_back():
    tensors = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(8)]

found = [resident()]
take_and_give_back()
found.append(resident())
heap = KeptHeap()
heap.keep(160 << 20)
found.append(resident())
for _ in range(3):
    take_and_give_back()
    found.append(resident())
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_is_kept():
    first, before, reserved, *kept = json.loads(run_python(RESIDENT, OMP_NUM_THREADS="1").stdout)
    assert before < first + 80  # what glibc keeps by itself
    assert reserved < before + 16  # address space alone
    assert all(first + 150 < mebibytes < before + 260 for mebibytes in kept)


def test_little_free_memory_is_not_kept(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    heap = KeptHeap()
    heap.keep(2**30 // 4)
    assert heap._behind is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    heap.keep(1)
    assert heap._behind is None
