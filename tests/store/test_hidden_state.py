"""What a model is beside its state dict is part of a store; global defaults of torch are not."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from torch import nn

from children import run_python
from trak_ext import Attributor, StoreError


class Scaled(nn.Module):
    """A classifier with a buffer that is not in the state dict."""

    def __init__(self, scale):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.scale


class Attention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, heads, batch_first=True)
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x = x[:, None]
        return self.layer(self.attention(x, x, x, need_weights=False)[0][:, 0])


def data(n=20):
    torch.manual_seed(1)
    return [(torch.randn(n, 4), torch.randint(0, 3, (n,)))]


@pytest.mark.parametrize(("make", "values"), [(Scaled, (1.0, 5.0)), (Attention, (2, 4))])
def test_a_store_of_another_hidden_state_is_refused(make, values, tmp_path):
    torch.manual_seed(0)
    first = make(values[0])
    second = make(values[1])
    second.load_state_dict(first.state_dict())
    options = {"store": tmp_path, "proj_dim": 4, "progress": False}
    Attributor(first, "image_classification", **options).fit(data())
    other = Attributor(second, "image_classification", **options)
    with pytest.raises(StoreError, match="expected one made with architecture = "):
        other.fit(data())
    with pytest.raises(StoreError, match="expected one made with architecture = "):
        other.attribute(data(3))


def test_a_kernel_of_other_data_is_not_taken(tmp_path):
    torch.manual_seed(0)
    model = Scaled(1.0)
    options = {"proj_dim": 4, "progress": False}
    (x, y) = data()[0]
    for name, inputs in (("mine", x), ("other", 3 * x.flip(0))):
        store = tmp_path / name
        Attributor(model, "image_classification", store=store, **options).fit([(inputs, y)])
    kernel = tmp_path / "mine" / "checkpoint-0000" / "kernel-mean-0001.safetensors"
    mine = Attributor(model, "image_classification", store=tmp_path / "mine", **options)
    expected = mine.attribute(data(3))
    shutil.copy(tmp_path / "other" / kernel.relative_to(tmp_path / "mine"), kernel)
    for use in (mine.fit, mine.attribute):
        with pytest.raises(StoreError, match=re.escape(str(kernel))):
            use([(x, y)])
    kernel.unlink()
    assert torch.equal(mine.attribute(data(3)), expected)


def test_another_default_device_changes_nothing():
    code = """
import torch, trak_ext
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
train = [(torch.randn(20, 4), torch.randint(0, 3, (20,)))]
test = [(torch.randn(3, 4), torch.arange(3))]
def results():
    a = trak_ext.Attributor(
        model, "image_classification", proj_dim=4, progress=False, leverage=True, curvature="own",
        damping=1.0,
    )
    a.fit(train)
    return [a.attribute(test), *a.attribute(test, top_k=2), a.self_influence(),
            *trak_ext.top_k(train[0][0], test[0][0], 2)]
expected = results()
torch.set_default_device("meta")
for got, wanted in zip(results(), expected, strict=True):
    assert torch.equal(got, wanted)
"""
    run_python(code)
