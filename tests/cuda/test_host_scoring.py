"""The CUDA scoring's kernels, run on the host from their own source, against fp64.

What a GPU would forgive is an error here: see cuda_host/device_host.h.
"""

from __future__ import annotations

import functools
import re
import shutil

import pytest
import torch

from cuda_host.builds import SOURCES, build_runner
from cuda_host.library import WARPGROUP
from cuda_host.scoring_library import MMA as MMA_PATH
from cuda_host.scoring_library import ScoringLibrary
from trak_ext import _C
from trak_ext.kernels import cuda_paths, operators
from trak_ext.kernels.score_pass import SolvedTargets

MMA = ["medium", "high", "highest"]
PRECISIONS = ["plain", *MMA, *(WARPGROUP + precision for precision in MMA)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = torch.float64

# Parts of sum_m |c| |weight| |features| |solved| that a score may be off. Two roundings to bf16 of
# 2^-9 each; what two parts leave (2^-17) and the product that they drop (2^-16); fp32 arithmetic
# with matrix instructions that truncate.
TOLERANCE = {"plain": 2**-21, "medium": 2**-7.9, "high": 2**-15, "highest": 2**-21, WIDE: 2**-50}
TOLERANCE |= {WARPGROUP + precision: TOLERANCE[precision] for precision in MMA}


@pytest.fixture(scope="module")
def library() -> ScoringLibrary:
    return ScoringLibrary()


def make(checkpoints, rows, targets, proj_dim, dtype=torch.float32, scaled=True):
    """Return features, solved targets, and coefficients and weights or nothing."""
    compute = WIDE if dtype == WIDE else torch.float32
    features = [torch.randn(rows, proj_dim).to(dtype) for _ in range(checkpoints)]
    solved = torch.randn(checkpoints, targets, proj_dim, dtype=compute)
    if not scaled:
        return features, solved, {}
    scales = {
        "coefficients": 1 + torch.rand(checkpoints, rows, dtype=compute),
        "weights": torch.randn(rows, dtype=compute),
    }
    return features, solved, scales


def exact(features, solved, coefficients=None, weights=None):
    """Return scores, and what their errors are measured by: fp64 [n, t]."""
    stacked = torch.stack(features).double()
    c = torch.ones(()) if coefficients is None else coefficients.double()[:, :, None]
    w = torch.ones(()) if weights is None else weights.double()[:, None]
    scores = (c * (stacked @ solved.double().mT)).sum(0) * w
    bound = (c.abs() * (stacked.abs() @ solved.double().abs().mT)).sum(0) * w.abs()
    return scores, bound


def check(library, features, solved, scales, precision):
    got = library.score(features, solved, precision=precision, **scales)
    scores, bound = exact(features, solved, **scales)
    tolerance = TOLERANCE[WIDE if solved.dtype == WIDE else precision]
    assert got.dtype == solved.dtype
    assert ((got.double() - scores).abs() <= tolerance * bound).all()
    return ((got.double() - scores).abs() / bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpoints", [1, 3])
@pytest.mark.parametrize("targets", [5, 70])
def test_every_dtype_precision_and_tile(library, dtype, precision, checkpoints, targets):
    for scaled in (True, False):
        problem = make(checkpoints, 40, targets, 90, dtype, scaled)
        check(library, *problem, precision)


@pytest.mark.parametrize("name", ["coefficients", "weights"])
@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_coefficients_and_weights_alone(library, name, precision):
    features, solved, scales = make(2, 20, 3, 20)
    check(library, features, solved, {name: scales[name]}, precision)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("scaled", [True, False])
def test_fp64_throughout(library, dtype, scaled):
    features, solved, scales = make(3, 70, 66, 90, WIDE, scaled)
    check(library, [phi.to(dtype) for phi in features], solved, scales, "plain")


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_samples_around_tile_borders(library, precision):
    for rows in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257):
        check(library, *make(1, rows, 3, 18), precision)


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_targets_around_tile_borders(library, precision):
    for targets in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129):
        check(library, *make(1, 5, targets, 18), precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["plain", "highest", "warpgroup highest"])
def test_features_around_step_borders(library, dtype, precision):
    for proj_dim in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 81, 127, 128, 129):
        for checkpoints in (1, 2):
            check(library, *make(checkpoints, 3, 2, proj_dim, dtype), precision)


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high"])
def test_zero_sizes(library, precision):
    for checkpoints, rows, targets in ((1, 0, 3), (1, 3, 0), (1, 0, 0)):
        got = library.score(*make(checkpoints, rows, targets, 8, scaled=False)[:2])
        assert got.shape == (rows, targets)
    features, solved, scales = make(2, 3, 4, 0)
    assert (library.score(features, solved, precision=precision, **scales) == 0).all()
    values, indices, bad = library.top_k(features, solved, 2, precision=precision)
    assert (values == 0).all()
    assert indices.tolist() == [[0, 1]] * 4
    assert not bad


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(library, dtype):
    for precision in PRECISIONS:
        features = [torch.randint(-100, 101, (33, 200)).to(dtype) for _ in range(2)]
        solved = torch.randint(-100, 101, (2, 20, 200)).float()
        weights = torch.randint(-3, 4, (33,)).float()
        got = library.score(features, solved, precision=precision, weights=weights)
        assert torch.equal(got.double(), exact(features, solved, weights=weights)[0])


def test_highest_keeps_what_two_parts_would_lose(library):
    # One product a score: the kept products of parts, and one addition that truncates, are within
    # 2^-22 of it. Without a third part, some of these are off by 2^-17 or so.
    features, solved, _ = make(1, 128, 64, 1, scaled=False)
    for dtype in DTYPES:
        halves = [phi.to(dtype) for phi in features]
        scores, bound = exact(halves, solved)
        for path in ("", WARPGROUP):
            highest = library.score(halves, solved, precision=path + "highest").double()
            assert ((highest - scores).abs() / bound).max() <= 2**-22
            high = library.score(halves, solved, precision=path + "high").double()
            assert 2**-19 < ((high - scores).abs() / bound).max() <= 2**-15.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["highest", "warpgroup highest"])
def test_strides_and_alignment_make_no_difference(library, dtype, precision):
    features, solved, scales = make(2, 20, 3, 37, dtype)
    scales["precision"] = precision
    expected = library.score(features, solved, **scales)
    for shift in range(5):
        for pitch in (37, 40, 44, 48):
            moved = []
            for phi in features:
                storage = torch.full((20 * pitch + 8,), float("nan"), dtype=dtype)
                start = shift + (-storage.data_ptr() // phi.element_size()) % 4
                rows = storage[start : start + 20 * pitch].view(20, pitch)
                moved.append(rows[:, :37].copy_(phi))
            assert torch.equal(library.score(moved, solved, **scales), expected)
    broadcast = [phi[:1].expand(20, 37) for phi in features]
    got = library.score(broadcast, solved, precision=precision)
    assert torch.equal(got, got[:1].expand(20, 3))
    for out in (torch.ones(20, 9)[:, 2:5], torch.ones(40, 3)[::2], torch.ones(3, 20).T):
        assert torch.equal(library.score(features, solved, out=out, **scales), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_launch_shape_makes_no_difference(library, precision):
    # Tiles of few and of many targets, targets and checkpoints that fit in a launch, rows of a
    # batch, the order of threads and blocks, tiles that a block makes one after the other.
    features, solved, scales = make(3, 140, 70, 40)
    whole = library.score(features, solved, precision=precision, **scales)
    arguments = {"precision": precision, **scales}
    tile = 64 * 64 * 2 * 3
    for workspace_bytes in (tile, 2 * tile, 3 * tile, 5 * tile):
        part = library.score(
            features,
            solved,
            workspace_bytes=workspace_bytes,
            order_seed=workspace_bytes,
            **arguments,
        )
        assert torch.equal(part, whole)
    for tile_for_targets in (1, 16, 17, 33, 1000):
        for multiprocessors in (1, 3):
            part = library.score(
                features,
                solved,
                tile_for_targets=tile_for_targets,
                multiprocessors=multiprocessors,
                **arguments,
            )
            assert torch.equal(part, whole)
    for rows, targets in ((1, 1), (33, 70), (140, 9)):
        part = library.score(
            [phi[140 - rows :] for phi in features],
            solved[:, :targets].contiguous(),
            precision=precision,
            weights=scales["weights"][140 - rows :].contiguous(),
            coefficients=scales["coefficients"][:, 140 - rows :].contiguous(),
        )
        assert torch.equal(part, whole[140 - rows :, :targets])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", MMA)
def test_both_matrix_instructions_give_the_same_bits(library, dtype, precision):
    # On the host they round alike; what is shown is that sums have the same terms in one order.
    for shape in ((2, 200, 130, 150), (1, 70, 40, 64), (3, 30, 3, 33)):
        features, solved, scales = make(*shape, dtype)
        scales["precision"] = precision
        expected = library.score(features, solved, **scales)
        scales["precision"] = WARPGROUP + precision
        assert torch.equal(library.score(features, solved, **scales), expected)


@pytest.mark.parametrize("precision", ["plain", "highest", "warpgroup highest"])
def test_more_checkpoints_than_a_launch_takes(library, precision):
    check(library, *make(300, 9, 2, 5), precision)


def best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = scores.T.sort(dim=1, descending=True, stable=True)
    return values[:, :count], indices[:, :count]


@pytest.mark.parametrize("precision", ["plain", "high", "warpgroup high", WIDE])
@pytest.mark.parametrize(("rows", "targets", "count"), [(1, 1, 1), (300, 70, 7), (3000, 2, 1024)])
def test_top_k_are_the_sorted_scores(library, precision, rows, targets, count):
    features, solved, scales = make(2, rows, targets, 20, WIDE if precision == WIDE else DTYPES[0])
    arguments = {"precision": "plain" if precision == WIDE else precision, **scales}
    expected = best(library.score(features, solved, **arguments), count)
    for workspace_bytes in (2**22, 2**20, 70_000):  # the last: several rounds of samples
        if workspace_bytes == 70_000 and targets > 2:
            continue
        *got, bad = library.top_k(
            features,
            solved,
            count,
            workspace_bytes=workspace_bytes,
            order_seed=workspace_bytes,
            **arguments,
        )
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert not bad


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 512, 513, 700])
def test_top_k_with_ties_up_to_all_samples(library, count):
    features = [torch.randint(-1, 2, (700, 3)).float()]  # few values, both zeros, many ties
    solved = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-0.0, 2.0, 1.0]]])
    scores = library.score(features, solved)
    expected = best(scores, count)
    values, indices, bad = library.top_k(features, solved, count)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])
    assert not bad


@pytest.mark.parametrize(("precision", "step"), [("highest", 16), ("warpgroup highest", 64)])
def test_top_k_in_small_pieces(library, precision, step):
    # The least workspace: one group, one checkpoint and tile of targets at a time, slabs of 1024.
    features, solved, scales = make(2, 2500, 66, 6)
    scales["precision"] = precision
    tile = 64 * step * 2 * 3 + 64 * (5 * 12 + 1024 * 4)
    expected = best(library.score(features, solved, **scales), 5)
    got = library.top_k(features, solved, 5, workspace_bytes=tile, **scales)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    with pytest.raises(RuntimeError, match=f"workspace: expected at least {tile} bytes, got 9"):
        library.top_k(features, solved, 5, workspace_bytes=9, **scales)
    with pytest.raises(RuntimeError, match="count: expected at most 1024, got 1025"):
        library.top_k(features, solved, 1025, **scales)


def test_top_k_of_infinite_scores(library):
    features = [torch.tensor([[-float("inf")], [3.0], [-float("inf")], [float("inf")]])]
    _, indices, bad = library.top_k(features, torch.ones(1, 1, 1), 4, precision="plain")
    assert indices.tolist() == [[3, 1, 0, 2]]
    assert not bad


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_sample_and_nan_is_flagged(library, precision, dtype, poison):
    features, solved, scales = make(2, 20, 3, 20, dtype)
    clean = library.score(features, solved, precision=precision, **scales)
    features[1][13, 17] = poison
    got = library.score(features, solved, precision=precision, **scales)
    others = [i for i in range(20) if i != 13]
    assert torch.equal(got[others], clean[others])
    assert not got[13].isfinite().any()
    bad = library.top_k(features, solved, 2, precision=precision, **scales)[2]
    assert bad == bool(got.isnan().any())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_infinite_coefficient_scales_what_there_is(library, precision):
    # And makes nothing of the features that a kernel fills up with zeros.
    features = [torch.ones(3, 200), torch.ones(3, 200)]
    scales = {"coefficients": torch.ones(2, 3)}
    scales["coefficients"][1, 1] = float("inf")
    expected = torch.tensor([[400.0], [float("inf")], [400.0]]).expand(3, 2)
    for dtype in DTYPES:
        stored = [phi.to(dtype) for phi in features]
        got = library.score(stored, torch.ones(2, 2, 200), precision=precision, **scales)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_floats_stay_finite(library, precision):
    largest = torch.finfo(torch.float32).max
    features = [torch.tensor([[largest], [-largest]])]
    got = library.score(features, torch.tensor([[[0.5], [-0.5]]]), precision=precision)
    ratio = got.double() / (largest * 0.5)
    assert ((ratio.abs() - 1).abs() <= 2**-7).all()


@pytest.fixture
def on_host(library, monkeypatch):
    """Let the Python side of CUDA scoring call the kernels that run on the host."""
    if not hasattr(_C, "CUDA_TOP_K_MAX"):
        pytest.skip("trak_ext was built without CUDA")
    kernels = {"cuda_score": library.cuda_score, "cuda_top_k": library.cuda_top_k}
    native = SolvedTargets._kernel
    monkeypatch.setattr(
        SolvedTargets, "_kernel", lambda self, name: kernels.get(name) or native(self, name)
    )
    monkeypatch.setattr(operators, "cuda_queue", lambda device: (0, 0))
    monkeypatch.setattr(
        cuda_paths,
        "scoring_path",
        lambda device, dtype: "plain" if dtype == WIDE else "mma",
    )


@pytest.mark.parametrize("dtype", [WIDE, *DTYPES])
def test_the_python_side_hands_over_what_the_kernels_want(on_host, dtype, monkeypatch):
    features, solved, scales = make(2, 1100, 5, 33, dtype)
    features[1] = features[1].T.contiguous().T  # not what the kernels read as it is
    targets = SolvedTargets(solved, solved.dtype)
    out = torch.empty(5, 1100, dtype=solved.dtype).T
    targets._cuda_score(features, scales["weights"], scales["coefficients"], out)
    scores, bound = exact(features, solved, **scales)
    tolerance = TOLERANCE[WIDE if dtype == WIDE else "highest"]
    assert ((out.double() - scores).abs() <= tolerance * bound).all()
    for k, limit in ((1, 2**28), (30, 0), (1024, 2**28)):
        monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", limit)
        got = targets._cuda_top_k(features, scales["weights"], k, scales["coefficients"])
        assert torch.equal(got.values, best(out, k)[0])
        assert torch.equal(got.indices, best(out, k)[1])
    features[0][7, 7] = float("nan")
    with pytest.raises(ValueError, match="expected scores that can be ordered, got NaN"):
        targets._cuda_top_k(features, scales["weights"], 1, scales["coefficients"])


def test_top_k_above_the_kernels_is_merged_from_blocks(on_host, monkeypatch):
    features = [torch.randint(-1, 2, (3000, 3)).float()]
    targets = SolvedTargets(torch.ones(1, 2, 3), torch.float32)
    weights = torch.ones(3000)
    monkeypatch.setattr(operators, "CUDA_WORKSPACE_BYTES", 0)
    for k in (1025, 3000):
        got = targets._cuda_top_k(features, weights, k, None)
        expected = best(targets.score(features, weights), k)
        assert torch.equal(got.values, expected[0])
        assert torch.equal(got.indices, expected[1])


@pytest.fixture(scope="module")
def runner():
    return build_runner()


# Faults planted in copies of the source, and what must be said of them; "" for a wrong result.
WARPGROUP_FAULTS = {
    "missing barrier": (
        "scoring_warpgroup_kernel.h",
        "  device::block_barrier();\n",
        "",
        "another thread|under way|nobody wrote|since the last barrier|was not begun",
    ),
    "targets not waited for": (
        "scoring_warpgroup_kernel.h",
        "  fetch.wait_targets(slot, odd);\n",
        "",
        "under way|nobody wrote|not waited for",
    ),
    "targets of the time before": (
        "scoring_warpgroup_kernel.h",
        "    odd ^= 1;\n",
        "",
        "under way|nobody wrote|not waited for|never come",
    ),
    "fewer targets expected than come": (
        "scoring_stages.h",
        "device::expect_bytes(filled(slot), Tile::kTargetBytes);",
        "device::expect_bytes(filled(slot), Tile::kTargetBytes / 2);",
        "under way|nobody wrote|not waited for|never come",
    ),
    "copies not waited for": (
        "scoring_warpgroup_kernel.h",
        "device::wait_copies<Tile::kSlots - 3>();",
        "device::wait_copies<Tile::kSlots - 2>();",
        "under way",
    ),
    "slot filled while it may be multiplied": (
        "scoring_warpgroup_kernel.h",
        "slot < 2 ? slot + Tile::kSlots - 2 : slot - 2",
        "slot < 1 ? slot + Tile::kSlots - 1 : slot - 1",
        "may read it|another thread",
    ),
    "missing fence of registers": (
        "scoring_warpgroup_kernel.h",
        "  device::begin_multiply(a, products);\n",
        "",
        "since the last fence",
    ),
    "registers made anew without a wait": (
        "scoring_warpgroup_kernel.h",
        "      device::wait_multiplied<0>();\n",
        "",
        "a register of a matrix instruction changed|may read it",
    ),
    "sums read without a wait": (
        "scoring_warpgroup_kernel.h",
        "  device::finish_multiply(products);\n",
        "",
        "changed|under way|since the last fence|may read it",
    ),
    "a checkpoint's last products left": (
        "scoring_warpgroup_kernel.h",
        "      if (Tile::kFlushesLate) {\n        const int turns",
        "      if (false) {\n        const int turns",
        "changed|under way|since the last fence",
    ),
    "a step that starts from nothing": (
        "scoring_warpgroup_kernel.h",
        "step % Tile::kFlushSteps == 0, a, products",
        "true, a, products",
        "",
    ),
    "sums that start from what was there": (
        "scoring_warpgroup_kernel.h",
        "step % Tile::kFlushSteps == 0, a, products",
        "step == 0 && Tile::kFlushSteps == 0, a, products",
        "",
    ),
    "wrong leading dimension": (
        "scoring_warpgroup_kernel.h",
        "Tile::kHalfBytes, Tile::kCoreBytes),",
        "Tile::kCoreBytes, Tile::kCoreBytes),",
        "",
    ),
    "wrong step of the operand": (
        "scoring_warpgroup_kernel.h",
        "i * Tile::kStepBytes",
        "i * Tile::kPartBytes",
        "",
    ),
    "wrong fragment register": (
        "scoring_warpgroup_kernel.h",
        "a[part][2 + i] = second[part];",
        "a[part][3 - i] = second[part];",
        "",
    ),
    "a product of parts left out": (
        "scoring_warpgroup_kernel.h",
        "if (j < 0) continue;",
        "if (j < 0 || i == 2) continue;",
        "",
    ),
    "halves of a step exchanged": (
        "split_targets_kernel.h",
        "parts[part][pair % 2].word[pair / 2]",
        "parts[part][1 - pair % 2].word[pair / 2]",
        "",
    ),
    "read past the last target": (
        "split_targets_kernel.h",
        "target < launch.targets ? launch.proj_dim - feature : 0",
        "launch.proj_dim - feature",
        "global memory out of bounds",
    ),
    "read past the last feature": (
        "scoring_stages.h",
        "launch_.aligned_pieces && left >= kPieceElements",
        "launch_.aligned_pieces",
        "global memory out of bounds",
    ),
    "read past the last sample": (
        "scoring_stages.h",
        "first_row + i < last_row_ ? first_row + i : last_row_);",
        "first_row + i);",
        "global memory out of bounds",
    ),
    "a checkpoint's end taken for none": (
        "scoring_warpgroup_kernel.h",
        "(kStage + Tile::kSlots) % 2 == 1;",
        "(kStage + Tile::kSlots) % 2 == 0;",
        "",
    ),
    "the next tile's samples forgotten": (
        "scoring_stages.h",
        "        if (tile_ < launch_.tiles) begin_checkpoint();\n",
        "",
        "global memory out of bounds",
    ),
    "scores of samples that do not exist": (
        "scoring_warpgroup_kernel.h",
        "    if (8 * half >= scores.samples) continue;\n",
        "",
        "global memory out of bounds",
    ),
    "scores of targets that do not exist": (
        "scoring_warpgroup_kernel.h",
        "if (8 * n < scores.targets) device",
        "device",
        "global memory out of bounds",
    ),
    "coefficients of another sample": (
        "scoring_warpgroup_kernel.h",
        "device::load_global<uint32_t>(from + 8 * half)",
        "device::load_global<uint32_t>(from)",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*WARPGROUP_FAULTS, None])
def test_planted_faults_of_the_warpgroups_kernel_are_caught(fault, tmp_path, runner):
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    message = ""
    if fault is not None:
        name, before, after, message = WARPGROUP_FAULTS[fault]
        file = sources / "cuda" / name
        text = file.read_text()
        assert text.count(before) == 1
        file.write_text(text.replace(before, after))
    faulty = ScoringLibrary(tmp_path, sources, only=WARPGROUP, runner=runner)
    # Two checkpoints of two and a bit turns, two tiles of a block's, the last samples and targets
    # of a tile missing, and the last features of aligned rows.
    features = [torch.randn(150, 160)[:, :158] for _ in range(2)]
    solved = torch.randn(2, 21, 158)
    scales = {"coefficients": 1 + torch.rand(2, 150)}
    scores, bound = exact(features, solved, **scales)
    problems = []
    for precision in ("high", "highest"):
        run = functools.partial(
            faulty.score, features, solved, precision=WARPGROUP + precision, **scales
        )
        try:
            got = run()
        except RuntimeError as error:
            problems.append(str(error))
            continue
        # What an omitted product of three parts costs is near the tolerance.
        if not ((got.double() - scores).abs() <= TOLERANCE[precision] / 2 * bound).all():
            problems.append("")
    if fault is None:
        assert problems == []
    else:
        found = [re.search(message, problem) if message else not problem for problem in problems]
        assert any(found), problems


FAULTS = {
    "missing barrier": (
        "scoring_kernel.h",
        "      device::block_barrier();\n",
        "",
        "another thread|under way|nobody wrote",
    ),
    "copies not waited for": (
        "scoring_kernel.h",
        "device::wait_copies<Tile::kSlots - 2>();",
        "device::wait_copies<Tile::kSlots - 1>();",
        "under way",
    ),
    "slot refilled while it is read": (
        "scoring_kernel.h",
        "i + 1 < Tile::kSlots; ++i) fetch.next();",
        "i < Tile::kSlots; ++i) fetch.next();",
        "another thread|under way",
    ),
    "read past the last feature": (
        "scoring_kernel.h",
        "launch_.aligned_quads && left >= 4",
        "launch_.aligned_quads",
        "global memory out of bounds",
    ),
    "read past the last sample": (
        "scoring_kernel.h",
        "(row < last_row_ ? row : last_row_)",
        "row",
        "global memory out of bounds",
    ),
    "read past the last target": (
        "split_targets_kernel.h",
        "target < launch.targets && feature + i < launch.proj_dim",
        "feature + i < launch.proj_dim",
        "global memory out of bounds",
    ),
    "scores of targets that do not exist": (
        "scoring_kernel.h",
        "if (row >= block.rows || target >= block.targets) return;",
        "if (row >= block.rows) return;",
        "global memory out of bounds",
    ),
    "wrong fragment register": (
        "scoring_kernel.h",
        "a[part][i / 2][2 + i % 2] = second[part];",
        "a[part][i / 2][3 - i % 2] = second[part];",
        "",
    ),
    "a product of parts left out": (
        "scoring_kernel.h",
        "if (j < 0) continue;",
        "if (j < 0 || i == 2) continue;",
        "",
    ),
    "votes read before they are there": (
        "top_k_kernel.h",
        "    device::block_barrier();\n    int before",
        "    int before",
        "another thread|nobody wrote",
    ),
    "votes that do not take turns": (
        "top_k_kernel.h",
        "round_ ^= 1;",
        "",
        "another thread",
    ),
    "a sorting step without its barrier": (
        "top_k_kernel.h",
        "          }\n        }\n        device::block_barrier();",
        "          }\n        }",
        "another thread",
    ),
    "ties by the higher index": (
        "top_k_kernel.h",
        "a.index < b.index",
        "a.index > b.index",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, tmp_path, runner):
    name, before, after, message = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    file = sources / "cuda" / name
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))
    faulty = ScoringLibrary(tmp_path, sources, only=MMA_PATH, runner=runner)
    # Aligned rows, of which the last is cut short: what lies beyond it is not the problem's.
    features = [torch.randn(600, 100)[:, :98]]
    features[0][300] = features[0][0]
    solved = torch.randn(1, 21, 98)
    if message:
        run = faulty.top_k if name == "top_k_kernel.h" else faulty.score
        arguments = (40,) if name == "top_k_kernel.h" else ()
        with pytest.raises(RuntimeError, match=message):
            run(features, solved, *arguments)
    else:
        got, indices, _ = faulty.top_k(features, solved, 600)
        scores, bound = exact(features, solved)
        wrong = (got.double() - scores.T.gather(1, indices)).abs() > TOLERANCE["highest"] * (
            bound.T.gather(1, indices)
        )
        pair = (indices == 300).nonzero()[:, 1] - (indices == 0).nonzero()[:, 1]
        assert wrong.any() or (pair != 1).any()
