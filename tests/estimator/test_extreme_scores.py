"""Features of any magnitude, and kernel matrices that are none: right, or one sentence."""

from __future__ import annotations

import pytest
import torch

import trak_ext

GENERATOR = torch.Generator().manual_seed(4)
PHI = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
OPTIONS = [{}, {"leverage": True}, {"curvature": torch.rand(40, generator=GENERATOR)}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [-145, -130, -110, -60, -20, 0, 12, 40, 90, 125])
def test_scores_do_not_depend_on_the_scale_of_features(exponent, dtype, options):
    phi, targets = ((part * 2.0**exponent).to(dtype) for part in (PHI, TARGETS))
    if not (phi.isfinite().all() and phi.count_nonzero()):
        pytest.skip("does not fit the dtype")
    own = {name: t.to(dtype) if name == "curvature" else t for name, t in options.items()}
    wide = {name: t.double() if name == "curvature" else t for name, t in own.items()}
    expected = trak_ext.score(phi.double(), targets.double(), **wide)
    got = trak_ext.score(phi, targets, **own)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    best = trak_ext.top_k(phi, targets, 7, **own)
    assert best.values.dtype == got.dtype
    torch.testing.assert_close(best.values, got.T.sort(1, descending=True).values[:, :7])


def test_checkpoints_of_different_scales():
    phi, targets = torch.stack([PHI, PHI.flip(0) * 1e-35]), torch.stack([TARGETS, TARGETS * 1e-35])
    expected = trak_ext.score(phi, targets)
    got = trak_ext.score(phi.float(), targets.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("leverage", [False, True])
@pytest.mark.parametrize("given", ["train_features", "target_features", "weights", "curvature"])
@pytest.mark.parametrize("with_kernel", [False, True])
def test_nan_and_inf_never_come_through(bad, leverage, given, with_kernel):
    parts = {
        "train_features": PHI.float().clone(),
        "target_features": TARGETS.float().clone(),
        "weights": torch.ones(40),
        "curvature": torch.ones(40),
    }
    kernel = trak_ext.kernel_matrix(parts["train_features"]) if with_kernel else None
    parts[given].view(-1)[3] = bad
    for call in (trak_ext.score, lambda *a, **b: trak_ext.top_k(*a, k=3, **b)):
        with pytest.raises(ValueError, match=r"expected finite|NaN or Inf"):
            call(**parts, kernel=kernel, leverage=leverage)


def triangle(kernel):
    return kernel.triu()


def transposed_part(kernel):
    kernel = kernel.clone()
    kernel[0, 1] += kernel.abs().max() * 1e-2
    return kernel


def poisoned(kernel):
    kernel = kernel.clone()
    kernel[2, 1] = float("nan")
    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [triangle, transposed_part, poisoned])
@pytest.mark.parametrize("leverage", [False, True])
def test_what_is_no_kernel_matrix_is_refused(change, dtype, leverage):
    kernel = change(trak_ext.kernel_matrix(PHI)).to(dtype)
    message = r"kernel: expected (a symmetric matrix, as|finite entries)"
    with pytest.raises(ValueError, match=message):
        trak_ext.score(PHI, TARGETS, kernel=kernel, leverage=leverage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_matrix_of_rounded_sums_is_taken(dtype):
    rows = PHI.to(dtype)
    made = rows.T @ rows
    made[0, 1] = torch.nextafter(made[0, 1], torch.tensor(torch.inf, dtype=dtype))
    expected = trak_ext.score(PHI, TARGETS)
    got = trak_ext.score(PHI, TARGETS, kernel=made)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", ["no", "yes", 1, 0, None, torch.tensor(True)])
def test_flags_are_true_or_false(value):
    with pytest.raises(TypeError, match="leverage: expected True or False, got"):
        trak_ext.score(PHI, TARGETS, leverage=value)
    with pytest.raises(TypeError, match="largest: expected True or False, got"):
        trak_ext.top_k(PHI, TARGETS, 3, largest=value)
