"""How much memory is free, how much a computation takes, and whether it ran out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device; None where nothing tells.

    On CUDA, what is free and what torch holds without using it. On the CPU, the least of the
    system's available memory, what is left to the control groups (v1 or v2) this process is in, and
    what is left of its address space (ulimit -v).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    asked = [available_bytes(), address_space_bytes(), *control_group_bytes()]
    known = [found for found in asked if found is not None]
    return max(0, min(known)) if known else None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return MemAvailable of Linux."""
    return _kilobytes(root / "proc/meminfo", "MemAvailable")


def address_space_bytes(root: Path = Path("/")) -> int | None:
    """Return what RLIMIT_AS leaves, None where there is no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _kilobytes(root / "proc/self/status", "VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def control_group_bytes(root: Path = Path("/")) -> Iterator[int]:
    """Yield what the memory limit of each control group above this process leaves.

    File pages that the kernel would drop count as free.
    """
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's: the mount's own root is then the group.
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath(mount, *parts[:depth])
            limit, used = (_number(folder / name) for name in names[:2])
            if limit is not None and used is not None and limit < 2**60:  # v1 writes a huge "none"
                yield limit - used + _statistic(folder / "memory.stat", names[2])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "std::bad_alloc" in text
    )


class KeptHeap:
    """Keeps memory in the process that tensors on the CPU take and give back again and again.

    glibc gives what lies free at the end of its heap back to the system at once, above some 64 MiB,
    and the next tensors fault every page of it in anew, which can take as long as their arithmetic.
    A small tensor behind that memory keeps it, for whatever tensors of up to 32 MiB come next. No
    setting of the process is touched. Other C libraries lose nothing by it.
    """

    def __init__(self) -> None:
        self._size = 0
        self._behind: torch.UntypedStorage | None = None

    def keep(self, size: int) -> None:
        """Keep so many bytes and half as many, where that is at most a quarter of what is free.

        Address space at first: pages are taken when they are used.
        """
        size += size // 2
        free = free_bytes(torch.device("cpu"))
        if size <= self._size or free is None or size > free // 4:
            return
        self._size = size
        self._behind = None
        try:
            self._behind = _behind_free(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise


_BLOCK = 31 * 2**20  # glibc never has blocks of 32 MiB or more in its heap
_PAGES = 2**16
_TRIES = 4096


def _behind_free(size: int) -> torch.UntypedStorage | None:
    """Return pages right behind so many free bytes of the heap; None where there is no such place.

    Storages, which torch never fills.
    """
    torch.UntypedStorage(_BLOCK)  # once freed, blocks of this size are part of the heap
    blocks = [torch.UntypedStorage(_BLOCK) for _ in range(-(-size // _BLOCK))]
    end = max(block.data_ptr() for block in blocks)
    tried: list[torch.UntypedStorage] = []
    while len(tried) < _TRIES:  # small holes before the end are filled first
        tried.append(torch.UntypedStorage(_PAGES))
        if tried[-1].data_ptr() > end:
            return tried[-1]
    return None


class PeakBytes(TorchDispatchMode):
    """Notes the most bytes held at one time by tensors that were made within it.

    What kernels take for themselves while they run is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, counted=True)
        return result

    def _note(self, tensor: Tensor, counted: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if counted else 0

        def freed(_: Any) -> None:
            self._storages.pop(key, None)
            self._held -= size

        self._storages[key] = weakref.ref(storage, freed)
        self._held += size
        self.peak = max(self.peak, self._held)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _kilobytes(path: Path, name: str) -> int | None:
    for line in _lines(path):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _statistic(path: Path, name: str) -> int:
    for line in _lines(path):
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0
