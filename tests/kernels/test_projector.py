"""project, projection_matrix and Projector against the oracle, and the promises about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak_ext
from trak_ext import reference

KINDS = ["rademacher", "normal"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def matrix(num_params: int, proj_dim: int, **law) -> torch.Tensor:
    return torch.from_numpy(reference.projection_matrix(num_params, proj_dim, **law))


def close(got: torch.Tensor, grads: torch.Tensor, **law) -> None:
    """Compare with fp64, to a few rounding errors of the sum of absolute values."""
    fp32 = grads.float().double()
    exact = fp32 @ matrix(grads.shape[1], got.shape[1], **law).double()
    bound = fp32.abs().sum(1, keepdim=True) * 2**-23 * 8
    if law.get("kind") == "normal":
        bound = bound * 6
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@given(
    num_params=st.integers(0, 700),
    proj_dim=st.integers(0, 80),
    seed=st.integers(0, 2**64 - 1),
    model_id=st.integers(0, 2**32 - 1),
    param_offset=st.one_of(st.integers(0, 300), st.integers(2**32 - 300, 2**62)),
)
@settings(max_examples=40, deadline=None)
def test_matrix_is_the_law(kind, num_params, proj_dim, seed, model_id, param_offset):
    law = {"kind": kind, "seed": seed, "model_id": model_id, "param_offset": param_offset}
    got = trak_ext.projection_matrix(num_params, proj_dim, **law)
    assert got.dtype == torch.float32
    assert torch.equal(got, matrix(num_params, proj_dim, **law))


@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.integers(0, 70),
    num_params=st.integers(0, 400),
    proj_dim=st.integers(0, 70),
    param_offset=st.integers(0, 2**40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
@settings(max_examples=60, deadline=None)
def test_project_any_size_dtype_and_stride(
    kind, rows, num_params, proj_dim, param_offset, dtype, layout
):
    generator = torch.Generator().manual_seed(rows * 1000 + num_params)
    grads = torch.randn(rows, num_params, generator=generator).to(dtype)
    if layout == "transposed":
        grads = grads.T.contiguous().T
    elif layout == "strided":
        grads = torch.randn(2 * rows, 3 * num_params, generator=generator).to(dtype)[::2, ::3]
    elif layout == "expanded" and rows:
        grads = grads[:1].expand(rows, num_params)
    law = {"kind": kind, "seed": 5, "model_id": 2, "param_offset": param_offset}
    got = trak_ext.project(grads, proj_dim, **law)
    assert got.shape == (rows, proj_dim)
    assert got.dtype == torch.float32
    close(got, grads, **law)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_params", [127, 128, 129, 8191, 8192, 8193, 20000])
def test_project_at_the_borders_of_chunks_and_spans(kind, num_params):
    grads = torch.randn(3, num_params)
    close(trak_ext.project(grads, 33, kind=kind, param_offset=1), grads, kind=kind, param_offset=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("param_offset", [0, 100, 2**32 * 128 - 3, 2**40])
def test_unit_vectors_read_the_matrix_back(kind, param_offset):
    got = trak_ext.project(torch.eye(200), 50, kind=kind, seed=3, param_offset=param_offset)
    assert torch.equal(got, matrix(200, 50, kind=kind, seed=3, param_offset=param_offset))


def test_integers_are_exact():
    grads = torch.randint(-100, 101, (9, 50000))
    assert grads.abs().sum(1).max() <= 2**24
    exact = grads @ matrix(50000, 70, seed=1).long()
    assert torch.equal(trak_ext.project(grads.float(), 70, seed=1).long(), exact)


def test_float32_accuracy_is_that_of_a_matrix_product():
    grads = torch.randn(4, 2**17)
    signs = trak_ext.projection_matrix(2**17, 64)
    exact = grads.double() @ signs.double()
    ours = (trak_ext.project(grads, 64) - exact).norm()
    theirs = (grads @ signs - exact).norm()
    assert ours <= theirs


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_by_offset_adds_up(kind):
    grads = torch.randint(-9, 10, (4, 1000)).float()
    law = {"kind": kind, "seed": 9, "model_id": 1}
    whole = trak_ext.project(grads, 40, **law)
    parts = trak_ext.project(grads[:, :333], 40, **law)
    trak_ext.project(grads[:, 333:], 40, param_offset=333, out=parts, **law)
    if kind == "rademacher":
        assert torch.equal(parts, whole)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-3)


def test_mapping_is_the_concatenation_in_its_order():
    grads = {
        "weight": torch.randn(5, 7, 11),
        "scalar": torch.randn(5),
        "empty": torch.randn(5, 0),
        "half": torch.randn(5, 13).half(),
        "strided": torch.randn(5, 6, 4).transpose(1, 2),
    }
    flat = torch.cat([grad.reshape(5, -1).float() for grad in grads.values()], 1)
    close(trak_ext.project(grads, 20, seed=4), flat, seed=4)
    reordered = dict(reversed(grads.items()))
    assert not torch.equal(trak_ext.project(reordered, 20), trak_ext.project(grads, 20))


def test_out_is_accumulated_into_whatever_its_strides():
    grads = torch.randint(-9, 10, (6, 300)).float()
    expected = 1 + trak_ext.project(grads, 21)
    for out in (
        torch.ones(6, 21),
        torch.ones(6, 50)[:, 3:24],
        torch.ones(12, 21)[::2],
        torch.ones(21, 6).T,
        torch.ones(6, 63)[:, ::3],
    ):
        result = trak_ext.project(grads, 21, out=out)
        assert result is out
        assert torch.equal(out, expected)


def test_out_may_lie_in_the_same_buffer_beside_grads():
    buffer = torch.randint(-9, 10, (4, 100)).float()
    expected = trak_ext.project(buffer[:, 20:].clone(), 20) + buffer[:, :20]
    trak_ext.project(buffer[:, 20:], 20, out=buffer[:, :20])
    assert torch.equal(buffer[:, :20], expected)


def test_different_streams_are_different_matrices():
    laws = [
        {"seed": s, "model_id": m, "param_offset": o}
        for s in (0, 1, 2**32)
        for m in (0, 1)
        for o in (0, 128)
    ]
    seen = {trak_ext.projection_matrix(128, 8, **law).numpy().tobytes() for law in laws}
    assert len(seen) == len(laws)


def test_numpy_integers_are_accepted():
    grads = torch.randn(2, 10)
    got = trak_ext.project(grads, np.int64(8), seed=np.uint64(2**63), model_id=np.int32(1))
    assert torch.equal(got, trak_ext.project(grads, 8, seed=2**63, model_id=1))


def test_high_and_highest_are_one_on_the_cpu():
    grads = torch.randn(3, 500)
    for kind in KINDS:
        high = trak_ext.project(grads, 30, kind=kind)
        assert torch.equal(trak_ext.project(grads, 30, kind=kind, precision="highest"), high)


def test_projector_is_project_with_its_settings():
    projector = trak_ext.Projector(50, 16, kind="normal", seed=6)
    grads = torch.randn(3, 50)
    expected = trak_ext.project(grads, 16, kind="normal", seed=6, model_id=4)
    assert torch.equal(projector.project(grads, model_id=4), expected)
    assert torch.equal(
        projector.project({"a": grads[:, :20], "b": grads[:, 20:]}, 4),
        trak_ext.project(
            {"a": grads[:, :20], "b": grads[:, 20:]}, 16, kind="normal", seed=6, model_id=4
        ),
    )


def test_johnson_lindenstrauss_keeps_distances():
    points = torch.randn(20, 3000)
    features = trak_ext.project(points, 4096) / 64
    before, after = torch.pdist(points), torch.pdist(features)
    assert ((after / before - 1).abs() < 5 / 64 / 2**0.5).all()


BAD = [
    ({"grads": torch.randn(3)}, "grads: expected a dense"),
    ({"grads": torch.ones(3, 4, dtype=torch.int32)}, "grads: expected a dense"),
    ({"grads": torch.randn(3, 4).to_sparse()}, "grads: expected a dense"),
    ({"grads": [[1.0]]}, "grads: expected a dense"),
    ({"grads": {}}, "grads: expected at least one tensor"),
    ({"grads": {"a": torch.randn(3, 4), "b": torch.randn(2, 4)}}, r"grads\['b'\]: expected 3 rows"),
    ({"grads": {"a": torch.tensor(1.0)}}, r"grads\['a'\]: expected a dense"),
    ({"grads": torch.randn(3, 4, requires_grad=True)}, "grads: expected a tensor that does not"),
    (
        {"grads": torch.randn(3, 4, device="meta"), "out": torch.zeros(3, 8)},
        "out: expected a dense",
    ),
    ({"proj_dim": -1}, "proj_dim: expected an integer from 0"),
    ({"proj_dim": 2**32 + 1}, "proj_dim: expected an integer from 0"),
    ({"proj_dim": 8.0}, "proj_dim: expected an integer, got 8.0"),
    ({"kind": "gaussian"}, "kind: expected one of 'rademacher', 'normal', 'sjlt', got 'gaussian'"),
    ({"seed": -1}, "seed: expected an integer from 0"),
    ({"seed": 2**64}, "seed: expected an integer from 0"),
    ({"seed": True}, "seed: expected an integer, got True"),
    ({"model_id": 2**32}, "model_id: expected an integer from 0"),
    ({"param_offset": -1}, "param_offset: expected an integer from 0"),
    ({"param_offset": 2**63 - 1}, "param_offset: expected an integer from 0"),
    ({"precision": "fp8"}, "precision: expected one of"),
    ({"out": torch.zeros(3, 9)}, "out: expected a dense"),
    ({"out": torch.zeros(3, 8, dtype=torch.float64)}, "out: expected a dense"),
    ({"out": torch.zeros(1, 8).expand(3, 8)}, "out: expected rows that do not overlap"),
    ({"out": torch.zeros(20).as_strided((3, 8), (4, 1))}, "out: expected rows that do not overlap"),
    ({"out": [0.0]}, "out: expected a tensor"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_get_one_sentence(change, message):
    arguments = {"grads": torch.randn(3, 4), "proj_dim": 8, **change}
    out = arguments.get("out")
    before = out.clone() if isinstance(out, torch.Tensor) else None
    with pytest.raises((ValueError, TypeError), match=message) as error:
        trak_ext.project(arguments.pop("grads"), arguments.pop("proj_dim"), **arguments)
    assert "\n" not in str(error.value)
    if before is not None:
        assert torch.equal(out, before)


def test_overlapping_out_is_refused():
    buffer = torch.ones(4, 40)
    with pytest.raises(ValueError, match="out: expected memory apart from grads"):
        trak_ext.project(buffer[:, 10:], 20, out=buffer[:, :20])
    assert (buffer == 1).all()


def test_gradients_that_require_grad_pass_without_grad_mode():
    grads = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(trak_ext.project(grads, 4), trak_ext.project(grads.detach(), 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_dim": -1, "proj_dim": 4}, "grad_dim: expected"),
        ({"grad_dim": 5, "proj_dim": 0}, "proj_dim: expected an integer from 1"),
        ({"grad_dim": 5, "proj_dim": 4, "kind": "x"}, "kind: expected"),
    ],
)
def test_bad_projector(arguments, message):
    with pytest.raises(ValueError, match=message):
        trak_ext.Projector(**arguments)


def test_projector_refuses_another_size():
    with pytest.raises(
        ValueError, match="grads: expected grad_dim = 5 parameters per sample, got 6"
    ):
        trak_ext.Projector(5, 4).project(torch.randn(2, 6))


@pytest.mark.parametrize("given", [False, True])
def test_every_tensor_of_a_mapping_is_validated_once(given, monkeypatch):
    checked = []
    check = trak_ext._check.float_tensor

    def count(name, value, *expected):
        checked.append(name)
        return check(name, value, *expected)

    monkeypatch.setattr(trak_ext._check, "float_tensor", count)
    grads = {name: torch.randn(3, 4, 2) for name in ("a", "b", "c")}
    trak_ext.project(grads, 8, out=torch.zeros(3, 8) if given else None)
    assert len(checked) == len(grads)


def test_errors_name_the_tensor_as_the_caller_does():
    grads = {"a": torch.randn(3, 4), "layer.weight": torch.randn(3, 4).int()}
    with pytest.raises(ValueError, match=r"^grads\['layer.weight'\]: expected a dense fp64"):
        trak_ext.project(grads, 8)
    grads["layer.weight"] = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"^grads\['layer.weight'\]: expected 3 rows as"):
        trak_ext.project(grads, 8, out=torch.zeros(3, 8))


def test_a_projector_says_what_it_holds():
    projector = trak_ext.Projector(50, 16, kind="normal", seed=6)
    said = "Projector(50 parameters -> 16 features, kind='normal', seed=6, precision='high')"
    assert repr(projector) == said
    assert "kind='sjlt', nnz=4" in repr(trak_ext.Projector(50, 16, kind="sjlt", nnz=4))
