"""A progress bar over the samples of all checkpoints."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm.auto import tqdm


class Progress:
    """Says which checkpoint is under way, samples a second and the remaining time.

    In a notebook as a widget; elsewhere on a terminal alone, so that logs stay without it.

    Args:
        label: What is done.
        checkpoints: How many, M.
        samples: Of each checkpoint, if known beforehand.
        show: Whether to show anything.
    """

    def __init__(self, label: str, checkpoints: int, samples: int | None, show: bool) -> None:
        self._label = label
        self._checkpoints = checkpoints
        self._m = 0
        self._done = 0  # samples of this checkpoint
        total = None if samples is None else samples * checkpoints
        # A hidden bar is not made at all: tqdm has a lock that forked processes share, and one that
        # is killed while it has it would stop the others for ever.
        self._bar: tqdm | None = None
        if show and (_in_notebook() or _on_terminal()):
            self._bar = tqdm(total=total, desc=self._text(), unit=" samples")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, m: int) -> None:
        """Go on to checkpoint m."""
        first, self._m, self._done = self._done, m, 0
        if self._bar is not None:
            if m == 1 and self._bar.total is None:  # the first pass has told
                self._bar.total = first * self._checkpoints
            self._bar.set_description(self._text(), refresh=False)

    def advance(self, samples: int) -> None:
        """Count samples."""
        self._done += samples
        if self._bar is not None:
            self._bar.update(samples)

    def _text(self) -> str:
        if self._checkpoints == 1:
            return self._label
        return f"{self._label}: checkpoint {self._m + 1} of {self._checkpoints}"


def _in_notebook() -> bool:
    return any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
