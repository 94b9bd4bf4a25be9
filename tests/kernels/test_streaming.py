from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import trak_ext
from late_transport import LateTransport
from trak_ext.estimator import scoring
from trak_ext.kernels import score_pass, streaming
from trak_ext.kernels.score_pass import SolvedTargets, TopK
from trak_ext.kernels.streaming import stream_blocks

CPU = torch.device("cpu")


def problem(checkpoints=2, n=103, t=5, k=7, dtype=torch.float32):
    features = [torch.randn(n, k).to(dtype) for _ in range(checkpoints)]
    solved = torch.randn(checkpoints, t, k, dtype=torch.float64)
    return solved, features, torch.rand(n), 1 + torch.rand(checkpoints, n)


def streamed(solved, block_bytes):
    """Targets whose features come in blocks, through a device's streams that are played."""

    def stream(features):
        return stream_blocks(features, CPU, block_bytes, LateTransport())

    return SolvedTargets(solved, torch.float32, stream=stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 50, 52, 102, 103, 1000])
def test_blocks_give_the_scores_of_the_whole(dtype, rows):
    solved, features, weights, coefficients = problem(dtype=dtype)
    block_bytes = rows * 2 * 7 * features[0].element_size()
    for given in (None, coefficients):
        whole, blocks = SolvedTargets(solved, torch.float32), streamed(solved, block_bytes)
        expected = whole.score(features, weights, given)
        got = blocks.score(features, weights, given)
        torch.testing.assert_close(got, expected)
        for largest in (True, False):
            for k in (0, 1, 20, 103):
                best = whole.top_k(features, weights, k, largest, given)
                found = blocks.top_k(features, weights, k, largest, given)
                assert torch.equal(found.indices, best.indices)
                torch.testing.assert_close(found.values, best.values)


def test_ties_go_to_the_lower_index_across_blocks():
    solved = streamed(torch.ones(1, 2, 3, dtype=torch.float64), 36)
    found = solved.top_k([torch.ones(10, 3)], torch.ones(10), 4)
    assert found.indices.tolist() == [[0, 1, 2, 3]] * 2


def test_nothing_to_do():
    solved, features, weights, _ = problem(n=0)
    assert streamed(solved, 560).score(features, weights).shape == (0, 5)
    assert streamed(solved, 560).top_k(features, weights, 0).values.shape == (5, 0)


def test_a_nan_is_refused_wherever_it_is():
    solved, features, weights, _ = problem()
    features[1][99, 3] = float("nan")
    with pytest.raises(ValueError, match=r"train_features: expected scores .* got NaN"):
        streamed(solved, 560).top_k(features, weights, 3)


def test_two_blocks_are_held():
    _, features, _, _ = problem(checkpoints=3)
    transport = LateTransport()
    for _ in stream_blocks(features, CPU, 10 * 3 * 7 * 4, transport):
        pass
    assert transport.buffers == 2 * 2 * 3  # pinned and on the device, a checkpoint each


def blocks_are_right(module, eager_compute: bool, eager_copies: bool) -> bool:
    """Read a matrix that comes in blocks of four rows, on a stream that is early or late."""
    matrix = torch.arange(46.0).reshape(23, 2)
    transport = LateTransport(eager_compute, eager_copies)
    read: list[torch.Tensor] = []
    for block in module.stream_blocks([matrix], CPU, 4 * 2 * 4, transport):
        transport.compute_stream.add(lambda block=block: read.append(block.features[0].clone()))
    transport.compute_stream.record_event().synchronize()
    assert [len(block) for block in read] == [4, 4, 4, 4, 4, 3]
    return torch.equal(torch.cat(read), matrix)


@pytest.mark.parametrize("eager_compute", [False, True])
@pytest.mark.parametrize("eager_copies", [False, True])
def test_whichever_stream_is_ahead(eager_compute, eager_copies):
    assert blocks_are_right(streaming, eager_compute, eager_copies)


class Stop(BaseException):
    """What ends a consumer, as KeyboardInterrupt does."""


class BadFeatures:
    """Features [23, 2] whose rows from 12 on cannot be read."""

    shape = (23, 2)
    dtype = torch.float32
    element_size = torch.tensor(0.0).element_size

    def __getitem__(self, rows: slice) -> torch.Tensor:
        if rows.stop > 12:
            raise Stop
        return torch.zeros(rows.stop - rows.start, 2)


def leave_normally(blocks) -> None:
    for _ in blocks:
        pass


def leave_by_an_exception(blocks) -> None:
    for block in blocks:
        if block.rows.start == 8:
            raise Stop


def leave_the_loop(blocks) -> None:
    for block in blocks:
        if block.rows.start == 8:
            break


def leave_before_the_second_block(blocks) -> None:
    next(blocks)
    blocks.close()


EXITS = {
    **{"normally": leave_normally, "exception": leave_by_an_exception, "break": leave_the_loop},
    **{"early": leave_before_the_second_block, "features": leave_normally},
}


def copies_after_the_end(module, leave: str, eager_compute: bool, eager_copies: bool) -> list[str]:
    """Return what copies do to buffers that are given up, on streams that are early or late."""
    features = [torch.zeros(23, 2), BadFeatures() if leave == "features" else torch.zeros(23, 2)]
    transport = LateTransport(eager_compute, eager_copies)
    blocks = module.stream_blocks(features, CPU, 4 * 4 * 4, transport)
    with contextlib.suppress(Stop):
        EXITS[leave](blocks)
    del blocks
    transport.compute_stream.synchronize()  # in the order that finds most
    transport.copy_stream.synchronize()
    assert transport.buffers == 2 * 2 * 2
    assert not any(memory.lent for memory in transport.memories)
    return transport.faults


@pytest.mark.parametrize("leave", EXITS)
@pytest.mark.parametrize("eager_compute", [False, True])
@pytest.mark.parametrize("eager_copies", [False, True])
def test_no_copy_is_under_way_when_buffers_are_given_up(leave, eager_compute, eager_copies):
    assert copies_after_the_end(streaming, leave, eager_compute, eager_copies) == []


FAULTS = {
    "scored before it has come": ("            transport.compute_stream.wait_event(slot.copied)\n"),
    "copied over while it is scored": (
        "        self._transport.copy_stream.wait_event(self.computed)\n"
    ),
    "pinned buffer filled while it is read": (
        "            self.copied.synchronize()  # the pinned buffer is read until then\n"
    ),
    "no event after scoring": (
        "            slot.computed = transport.compute_stream.record_event()\n"
    ),
}
MODES = [(compute, copies) for compute in (False, True) for copies in (False, True)]


def faulty_streaming(line: str, folder: Path, monkeypatch):
    """Return the module without one of its lines."""
    text = Path(streaming.__file__).read_text()
    assert text.count(line) == 1
    copy = folder / "faulty_streaming.py"
    copy.write_text(text.replace(line, line[: -len(line.lstrip())] + "pass\n"))
    spec = importlib.util.spec_from_file_location("trak_ext.kernels.faulty_streaming", copy)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, tmp_path, monkeypatch):
    module = faulty_streaming(FAULTS[fault], tmp_path, monkeypatch)
    assert not all(blocks_are_right(module, *mode) for mode in MODES)


@pytest.mark.parametrize("leave", EXITS)
def test_buffers_given_up_without_a_wait_are_caught(leave, tmp_path, monkeypatch):
    line = "        transport.copy_stream.synchronize()\n"
    module = faulty_streaming(line, tmp_path, monkeypatch)
    found = {fault for mode in MODES for fault in copies_after_the_end(module, leave, *mode)}
    read = "a copy read pinned memory that had been taken back"
    wrote = "a copy wrote to the device's memory that had been taken back"
    # At its end the compute stream has waited for the last copy, but the host has not.
    assert found == ({read} if leave == "normally" else {read, wrote})


@pytest.mark.parametrize("leverage", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_score_and_top_k_with_features_that_are_streamed(leverage, given, monkeypatch):
    # Where targets are on a CUDA device and features are not; here all is on the CPU, so the
    # choice is made by hand.
    train, targets = torch.randn(2, 103, 7), torch.randn(2, 5, 7)
    weights, curvature = torch.rand(2, 103), torch.rand(2, 103)
    options = {"curvature": curvature, "leverage": leverage}
    if given:
        options["kernel"] = trak_ext.kernel_matrix(train, curvature)
    expected = trak_ext.score(train, targets, weights, **options)
    best = trak_ext.top_k(train, targets, 9, weights, **options)

    def blocks_on(device, features):
        block_bytes = 4 * 7 * 10 * len(features)
        return stream_blocks(features, device, block_bytes, LateTransport())

    for module in (score_pass, scoring):
        monkeypatch.setattr(module, "blocks_on", blocks_on)
    torch.testing.assert_close(trak_ext.score(train, targets, weights, **options), expected)
    found = trak_ext.top_k(train, targets, 9, weights, **options)
    assert isinstance(found, TopK)
    assert torch.equal(found.indices, best.indices)
