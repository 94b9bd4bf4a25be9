"""How many samples' gradients are computed at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from .. import _check
from .memory import free_bytes

LARGEST = 256
SHARE = 0.5  # of free memory; the rest is for features, loaders and what kernels take
# On the CPU, whose cores are busy with a few samples. Tensors of larger chunks outgrow the blocks
# of the allocator (32 MiB in glibc), and the pages they fault in can cost as much as all else.
MOST_BYTES = 2**28
UNKNOWN = 2**30  # bytes to use where the system does not tell what is free
TINY = 2**30  # bytes of a thousand such models and inputs that any machine takes a few of
SAFE = 1000  # times weights and inputs: more than activations are, unless those two are tiny


class ChunkSize:
    """The size of a sample chunk: as given, or as many as half of the free memory takes.

    On the CPU that is 256 MiB at most, or one sample.

    What is free is asked once, or said by another run; what a sample takes is measured once for
    each kind of sample (its tensors' shapes and dtypes), whatever came before. So sample chunks,
    and the last bits of gradients with them, depend on the batch and that number alone. Models so
    small that a thousand times their weights and inputs would fit are not measured.

    Args:
        given: A fixed number, None to choose.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self._most = LARGEST if given is None else given
        self._budget: int | None = None
        self._measured: dict[Hashable, int] = {}  # bytes that each kind of sample takes
        self.sample_bytes = 0  # of the last kind, where it was measured
        self._halved = False

    def budget(self, device: torch.device) -> int:
        """Return the bytes that a sample chunk may take, asking what is free the first time.

        A number of three significant bits, so that it is the same again where about as much is
        free.
        """
        if self._budget is None:
            free = free_bytes(device)
            found = UNKNOWN if free is None else int(SHARE * free)
            if device.type == "cpu":
                found = min(found, MOST_BYTES)
            low = max(0, found.bit_length() - 3)
            self._budget = found >> low << low
        return self._budget

    def use_budget(self, budget: int) -> None:
        """Take a number of bytes that a run before this one chose."""
        self._budget = budget

    def choose(
        self,
        device: torch.device,
        samples: int,
        kind: Hashable,
        input_bytes: int,
        weight_bytes: int,
        measure: Callable[[], int],
    ) -> int:
        """Return how many samples a sample chunk may have.

        Args:
            device: Where the gradients are computed.
            samples: In the batch.
            kind: What samples that take equally much have in common.
            input_bytes: Of one sample.
            weight_bytes: Of the model, which bounds a sample's gradients.
            measure: Returns all that one sample takes, by computing it; called only where needed.
        """
        if self.given is not None:
            return self._most
        tiny = min(samples, LARGEST) * SAFE * (input_bytes + weight_bytes)
        if tiny <= TINY:  # nobody need ask what is free
            return self._most
        budget = self.budget(device)
        if tiny <= budget:
            return self._most
        if kind not in self._measured:
            self._measured[kind] = measure()
        self.sample_bytes = self._measured[kind]
        return max(1, min(self._most, budget // max(self.sample_bytes, 1)))

    def halve(self, tried: int) -> int:
        """Take half of what did not fit in memory from now on, and return it; say so once."""
        if not self._halved:
            _check.warn(
                f"trak_ext ran out of memory with the gradients of {tried} samples at a time, and "
                "goes on with fewer"
            )
        self._halved = True
        self._most = max(1, tried // 2)
        return self._most
