"""Which parameters are chosen, and in what order."""

from __future__ import annotations

import pytest
from torch import nn

from trak_ext.gradients.parameters import choose_parameters

ALL = ["first.weight", "first.bias", "0.weight", "extra.weight"]
CHOICES = [
    (None, ["first.weight", "first.bias", "extra.weight"]),
    ("*", ALL),
    ("*.weight", ["first.weight", "0.weight", "extra.weight"]),
    (["extra.*", "first.bias"], ["first.bias", "extra.weight"]),
    (("0.weight",), ["0.weight"]),
    ("[fe]*", ["first.weight", "first.bias", "extra.weight"]),
    (["first.*", "*.bias"], ["first.weight", "first.bias"]),
    (lambda name, parameter: parameter.dim() == 1, ["first.bias", "0.weight"]),
    (lambda name, parameter: not parameter.requires_grad, ["0.weight"]),
]


@pytest.mark.parametrize(("params", "expected"), CHOICES)
def test_choice_of_parameters_in_the_models_order(params, expected):
    model = nn.ModuleDict({"first": nn.Linear(2, 3), "0": nn.PReLU(), "extra": nn.Embedding(2, 2)})
    model["0"].weight.requires_grad_(False)
    model["twice"] = model["extra"]
    assert choose_parameters(model, params) == expected
