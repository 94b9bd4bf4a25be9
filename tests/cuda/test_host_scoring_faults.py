"""Faults planted in copies of the CUDA scoring's source: running it on the host must tell."""

from __future__ import annotations

import functools
import re
import shutil

import pytest
import torch

from cuda_host.builds import SOURCES, build_runner
from cuda_host.library import WARPGROUP
from cuda_host.scoring_cases import TOLERANCE, exact
from cuda_host.scoring_library import MMA as MMA_PATH
from cuda_host.scoring_library import ScoringLibrary


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
        file = sources / "cuda" / "scoring" / name
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
    file = sources / "cuda" / "scoring" / name
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
