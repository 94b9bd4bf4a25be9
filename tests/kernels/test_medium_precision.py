"""precision="medium" on the CPU: fixed point where the machine has it, within 2**-9 of fp32."""

from __future__ import annotations

import math

import pytest
import torch

import trak_ext


def student_t(rows: int, params: int) -> torch.Tensor:
    """Heavy tails: Student's t with 3 degrees of freedom."""
    return torch.distributions.StudentT(3.0).sample((rows, params))


def one_scale(values: torch.Tensor) -> torch.Tensor:
    return values


def blocks_apart(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 384 parameters whose scales differ by up to 10**6, by chance."""
    blocks = -(-values.shape[1] // 384)
    scale = 10 ** (6 * torch.rand(values.shape[0], blocks)).repeat_interleave(384, 1)
    return values * scale[:, : values.shape[1]]


def tiny(values: torch.Tensor) -> torch.Tensor:
    return values * 1e-25


def huge(values: torch.Tensor) -> torch.Tensor:
    return values * 1e30


@pytest.mark.parametrize("draw", [torch.randn, student_t])
@pytest.mark.parametrize("scale", [one_scale, blocks_apart, tiny, huge])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_offset", [0, 2**33 + 5])
def test_error_of_a_row(draw, scale, dtype, param_offset):
    grads = scale(draw(13, 20_001)).to(dtype)
    law = {"seed": 11, "param_offset": param_offset}
    exact = grads.double() @ trak_ext.projection_matrix(20_001, 300, **law).double()
    got = trak_ext.project(grads, 300, precision="medium", **law).double()
    assert ((got - exact).norm(dim=1) / exact.norm(dim=1)).max() <= 2**-9


def test_half_precision_gradients():
    grads = torch.randn(5, 3000).half()
    exact = grads.double() @ trak_ext.projection_matrix(3000, 100).double()
    got = trak_ext.project(grads, 100, precision="medium").double()
    assert ((got - exact).norm(dim=1) / exact.norm(dim=1)).max() <= 2**-9


def test_a_chunk_of_zeros_is_zero():
    assert (trak_ext.project(torch.zeros(3, 1000), 40, precision="medium") == 0).all()


def test_unit_vectors_read_the_matrix_back():
    eye = torch.eye(500)
    got = trak_ext.project(eye, 60, precision="medium", param_offset=70)
    assert torch.equal(got, trak_ext.projection_matrix(500, 60, param_offset=70))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 383, 384, 1999])
def test_a_poisoned_row_comes_out_not_finite(poison, at):
    grads = torch.randn(30, 2000)
    clean = trak_ext.project(grads, 50, precision="medium")
    grads[17, at] = poison
    got = trak_ext.project(grads, 50, precision="medium")
    others = [i for i in range(30) if i != 17]
    assert torch.equal(got[others], clean[others])
    assert not torch.isfinite(got[17]).any()


def test_it_is_its_own_kernel_only_where_the_machine_has_one():
    grads = torch.randn(4, 3000)
    same = torch.equal(trak_ext.project(grads, 64, precision="medium"), trak_ext.project(grads, 64))
    assert same != trak_ext.build_info()["cpu_fixed_point"]


def test_its_error_does_not_grow_with_the_number_of_parameters():
    errors = []
    for params in (2**12, 2**17):
        grads = torch.randn(8, params)
        exact = trak_ext.project(grads, 128).double()
        got = trak_ext.project(grads, 128, precision="medium").double()
        errors.append(float((got - exact).norm() / exact.norm()))
    assert errors[1] <= 1.5 * errors[0] + 2**-24
    assert math.isfinite(errors[0])


@pytest.mark.parametrize("value", [1e36, 3.4e38 / 400])
def test_the_largest_finite_gradients_stay_finite(value):
    signs = torch.randint(0, 2, (3, 400)) * 2 - 1
    grads = signs * value
    got = trak_ext.project(grads, 64, precision="medium").double()
    exact = grads.double() @ trak_ext.projection_matrix(400, 64).double()
    assert torch.isfinite(got).all()
    assert ((got - exact).norm(dim=1) / exact.norm(dim=1)).max() <= 2**-9
