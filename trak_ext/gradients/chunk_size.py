"""How many samples' gradients are computed at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from .memory import free_bytes

LARGEST = 256
SHARE = 0.5  # of free memory; the rest is for features, loaders and what kernels take
MOST_BYTES = 2**31  # on the CPU, whose cores are busy with far less and whose memory is shared
UNKNOWN = 2**30  # bytes to use where the system does not tell what is free
SAFE = 1000  # times weights and inputs: more than activations are, unless those two are tiny


class ChunkSize:
    """The number of samples in a chunk: as given, or as many as half of the free memory takes.

    On the CPU that is 2 GiB at most.

    What is free is asked once, so that chunks, and with them the last bits of gradients, stay as
    they are while memory fills. What a sample takes is measured at the first sample and again when
    larger ones come (longer texts), so that the largest decides for smaller ones after it. Models
    so small that a thousand times their weights and inputs would fit are not measured.

    Args:
        given: A fixed number, None to choose.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self._most = LARGEST if given is None else given
        self._budget: int | None = None
        self._measured = -1  # input bytes of the largest sample measured
        self._sample_bytes = 0
        self._halved = False

    def choose(
        self,
        device: torch.device,
        samples: int,
        input_bytes: int,
        weight_bytes: int,
        measure: Callable[[], int],
    ) -> int:
        """Return the samples a chunk may have.

        Args:
            device: Where the gradients are computed.
            samples: In the batch.
            input_bytes: Of one sample.
            weight_bytes: Of the model, which bounds a sample's gradients.
            measure: Returns all that one sample takes, by computing it; called only where needed.
        """
        if self.given is not None:
            return self._most
        if self._budget is None:
            free = free_bytes(device)
            self._budget = UNKNOWN if free is None else int(SHARE * free)
            if device.type == "cpu":
                self._budget = min(self._budget, MOST_BYTES)
        most = min(samples, self._most)
        if most * SAFE * (input_bytes + weight_bytes) <= self._budget:
            return self._most
        if input_bytes > self._measured:
            self._sample_bytes = max(self._sample_bytes, measure())
            self._measured = input_bytes
        return max(1, min(self._most, self._budget // max(self._sample_bytes, 1)))

    def halve(self, tried: int) -> int:
        """Take half of what did not fit in memory from now on, and return it; say so once."""
        if not self._halved:
            warnings.warn(
                f"trak_ext ran out of memory with the gradients of {tried} samples at a time, and "
                "goes on with fewer",
                RuntimeWarning,
                stacklevel=3,
            )
        self._halved = True
        self._most = max(1, tried // 2)
        return self._most
