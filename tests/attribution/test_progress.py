"""Bars say which checkpoint, how fast and how long, move with chunks, and keep out of logs."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from tqdm.std import tqdm as terminal_bar

from attributor_cases import attributor, batches, mlp, states_of, vectors
from trak_ext.attribution import progress
from trak_ext.attribution.progress import Progress
from trak_ext.baselines import GradientProduct

MODULE = "trak_ext.attribution.progress"


class Bars:
    """Notes what bars are told."""

    def __init__(self):
        self.made, self.updates, self.texts = [], [], []

    def __call__(self, **options):
        self.made.append(options)
        bars = self

        class Bar(terminal_bar):
            def update(self, n=1):
                bars.updates.append(n)
                return super().update(n)

            def set_description(self, desc=None, refresh=True):
                bars.texts.append(desc)
                return super().set_description(desc, refresh)

        return Bar(**{**options, "file": io.StringIO(), "mininterval": 0})


@pytest.fixture
def bars(monkeypatch):
    made = Bars()
    made.__mro__ = ()
    monkeypatch.setattr(f"{MODULE}.tqdm", made)
    monkeypatch.setattr(f"{MODULE}._on_terminal", lambda: True)
    return made


def test_bars_say_which_checkpoint_and_move_with_chunks(bars, tmp_path):
    model, train = mlp(), vectors(12)
    options = {"checkpoints": states_of(model), "progress": True, "chunk_size": 5}
    fitted = attributor(model, store=tmp_path, **options)
    fitted.fit([train])
    assert bars.texts == ["fit: checkpoint 1 of 2", "fit: checkpoint 2 of 2"]
    assert bars.updates == [5, 5, 2] * 2
    fitted.attribute(batches(vectors(7), 6))
    assert bars.texts[2:] == ["targets: checkpoint 1 of 2", "targets: checkpoint 2 of 2"]
    assert bars.updates[6:] == [5, 1, 1] * 2
    fitted.fit([train])  # all is there
    assert sum(bars.updates[12:]) == 24
    assert len(bars.made) == 3


def test_baselines_have_the_same_bars(bars):
    model = mlp()
    method = GradientProduct(
        model, "image_classification", checkpoints=states_of(model), chunk_size=4
    )
    method.fit([vectors(9)])
    assert bars.texts == ["fit: checkpoint 1 of 2", "fit: checkpoint 2 of 2"]
    assert bars.updates == [4, 4, 1] * 2


def test_what_a_terminal_shows(monkeypatch):
    monkeypatch.setattr(f"{MODULE}._on_terminal", lambda: True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("fit", 3, 100, True) as bar:
        for m in range(3):
            bar.begin(m)
            bar.advance(100)
    shown = sys.stderr.getvalue()
    assert "fit: checkpoint 1 of 3:   0%" in shown
    assert re.search(
        r"fit: checkpoint 3 of 3: 100%.* 300/300 \[[\d:]+<[\d:]+, .* samples/s\]", shown
    )


def test_a_single_checkpoint_is_not_counted(monkeypatch, bars):
    with Progress("fit", 1, None, True) as bar:
        bar.begin(0)
        bar.advance(3)
    assert bars.texts == ["fit"]


def test_the_first_pass_tells_the_total(bars):
    with Progress("fit", 3, None, True) as bar:
        totals = []
        for m in range(3):
            bar.begin(m)
            bar.advance(7)
            bar.advance(2)
            totals.append(bar._bar.total)
    assert totals == [None, 27, 27]


def test_logs_stay_without_it(capfd):
    with Progress("fit", 2, 10, True) as bar:
        bar.begin(1)
        bar.advance(10)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("terminal", "notebook"), [(False, False), (True, False), (False, True)])
def test_shown_on_terminals_and_in_notebooks_alone(bars, monkeypatch, terminal, notebook):
    monkeypatch.setattr(f"{MODULE}._on_terminal", lambda: terminal)
    if notebook:
        bars.__mro__ = (type("tqdm_notebook", (), {"__module__": "tqdm.notebook"}),)
    for show in (True, False):
        Progress("fit", 1, 3, show)
    assert len(bars.made) == int(terminal or notebook)


def test_a_hidden_bar_takes_no_lock_that_a_killed_process_may_have(monkeypatch):
    monkeypatch.setattr(terminal_bar, "get_lock", lambda *_: pytest.fail("asked for the lock"))
    fitted = attributor(mlp(), progress=False)
    fitted.fit([vectors(4)])
    fitted.attribute([vectors(1)])


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not progress._on_terminal()
    fitted = attributor(mlp(), progress=True)
    fitted.fit([vectors(4)])
    assert fitted.attribute([vectors(1)]).dtype == torch.float32
