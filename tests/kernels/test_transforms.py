"""torch.func transforms, forward-mode derivatives and traces: right, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import trak_ext
from trak_ext.kernels import operators

GRADS = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
TARGETS = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))


def as_dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


DERIVATIVES = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "dual": as_dual,
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
}
FUNCTIONS = {
    "project": lambda x: trak_ext.project(x, 4),
    "project a mapping": lambda x: trak_ext.project({"a": GRADS, "b": x}, 4),
    "project to out": lambda x: trak_ext.project(x, 4, out=torch.zeros(3, 4)),
    "Projector": lambda x: trak_ext.Projector(6, 4).project(x),
    "score": lambda x: trak_ext.score(x, TARGETS),
    "score of targets": lambda x: trak_ext.score(GRADS, x),
    "weights": lambda x: trak_ext.score(GRADS, TARGETS, x[:, 0]),
    "curvature": lambda x: trak_ext.score(GRADS, TARGETS, curvature=x[:, 0]),
    "kernel": lambda x: trak_ext.score(GRADS, TARGETS, kernel=x.T @ x),
    "top_k": lambda x: trak_ext.top_k(x, TARGETS, 2).values,
    "kernel_matrix": lambda x: trak_ext.kernel_matrix(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_are_refused_and_never_zero(derivative, function):
    if derivative == "linearize" and function in ("curvature", "kernel"):
        pytest.skip("torch refuses to trace the check of a tensor that is not traced")
    expected = r"expected a tensor (that does not require grad|outside of torch.func transforms)"
    with pytest.raises(ValueError, match=expected) as error:
        DERIVATIVES[derivative](FUNCTIONS[function], GRADS)
    assert "\n" not in str(error.value)


def test_a_product_with_the_matrix_is_differentiated():
    matrix = trak_ext.projection_matrix(6, 4)
    _, tangent = torch.func.jvp(lambda x: x @ matrix, (GRADS,), (GRADS,))
    torch.testing.assert_close(tangent, trak_ext.project(GRADS, 4))


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if "project" not in name.lower()])
def test_vmap_of_scores_is_refused(function):
    with pytest.raises(ValueError, match=r"expected a tensor outside of torch\.func transforms"):
        torch.vmap(FUNCTIONS[function])(torch.stack([GRADS, GRADS]))


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
def test_a_traced_matrix_has_a_shape_and_a_run_one_has_entries(kind):
    options = {"kind": kind, "seed": 2**63 + 5, "param_offset": 77, "model_id": 3}
    expected = trak_ext.projection_matrix(6, 4, **options)
    with FakeTensorMode():
        fake = trak_ext.projection_matrix(6, 4, **options)
    assert fake.shape == (6, 4)
    assert fake.dtype == torch.float32

    def features(x):
        return x @ trak_ext.projection_matrix(6, 4, **options)

    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(features, tracing_mode=mode)(GRADS)
        assert torch.equal(traced(GRADS), GRADS @ expected)
    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(GRADS), GRADS @ expected)


def test_opcheck_of_the_matrix():
    law = ("normal", 5, 6, 7, 11, 1, torch.device("cpu"))
    torch.library.opcheck(operators.projection_matrix, (6, 4, *law))
    with pytest.raises(ValueError, match="kind: expected one of"):
        operators.projection_matrix(6, 4, "none", *law[1:])
    with pytest.raises(ValueError, match="nnz: expected a positive divisor"):
        operators.projection_matrix(6, 4, "sjlt", 0, 0, 0, 0, 3, torch.device("cpu"))


def test_scores_of_fake_tensors_are_refused():
    with FakeTensorMode():
        phi, targets = torch.randn(5, 3), torch.randn(2, 3)
        assert trak_ext.project(phi, 4).shape == (5, 4)
        for function in (trak_ext.score, lambda a, b: trak_ext.top_k(a, b, 2)):
            with pytest.raises(ValueError, match="expected a tensor with values, got a fake one"):
                function(phi, targets)
        with pytest.raises(ValueError, match="expected a tensor with values, got a fake one"):
            trak_ext.kernel_matrix(phi)
