"""A module under other weights, and attention that vmap takes with everything put back after it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trak_ext.gradients.functional import (
    EvalMode,
    computing,
    old_transformers,
    plain_attention,
    weights_in_place,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.settings = {"a": 1}

    def forward(self, x):
        return self.encode(x, factor=self.scale)

    def encode(self, x, factor=1.0):
        return self.head(self.body(x)) * factor


def models():
    """A module, another one, and the other one's weights."""
    model, other = Model().eval(), Model().eval()
    with torch.no_grad():
        other.scale.mul_(3)
        other.body[1].running_mean.add_(1)
    return model, other, {**dict(other.named_parameters()), **dict(other.named_buffers())}


def test_calls_methods_attributes_and_parts_have_the_weights():
    model, other, weights = models()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 3)
    with weights_in_place(model, weights):
        assert torch.equal(model(x), other(x))
        assert torch.equal(model.encode(x, factor=0.5), other.encode(x, factor=0.5))
        assert torch.equal(model.scale, other.scale)
        assert torch.equal(model.body(x), other.body(x))
        assert torch.equal(model.head.weight, other.head.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradients_reach_the_weights_through_methods_and_attributes():
    model, other, weights = models()
    with weights_in_place(model, weights):
        (model.encode(torch.ones(2, 3)).sum() * model.scale).backward()
    assert other.head.weight.grad.abs().sum() > 0
    assert other.scale.grad is not None
    assert model.scale.grad is None


class UsedTwice(nn.Module):
    """One layer under two names, and its weight under a third."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = self.first
        self.third = nn.Linear(3, 3, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("fails", [False, True])
def test_a_layer_under_two_names_keeps_its_own_weight(fails):
    model, other, x = UsedTwice(), UsedTwice(), torch.randn(2, 3)
    own, expected = model.first.weight, other(x)
    weights = dict(other.named_parameters())
    if fails:
        with pytest.raises(RuntimeError), weights_in_place(model, weights):
            model(torch.randn(2, 4))
    else:
        with weights_in_place(model, weights):
            torch.testing.assert_close(model(x), expected)
    assert model.first.weight is model.second.weight is model.third.weight is own


class Forgetful(nn.Module):
    """Writes to everything that a module has but its tensors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls, self.cache, self.seen, self.table = 0, None, [1], {"a": 1}

    def forward(self, x):
        self.calls += 1
        self.cache = self.layer(x)
        self.seen.append(x)
        self.table.pop("a")
        self.extra = x
        self.layer.register_forward_hook(lambda *_: None)
        self.added = nn.Linear(1, 1)
        return self.cache


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails):
    model = Forgetful().train()
    model.layer.eval()
    attributes, seen, table = dict(vars(model)), model.seen, model.table
    mode = EvalMode(model)
    try:
        with computing(model, mode):
            assert not model.training
            model(torch.randn(1, 3))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert vars(model) == attributes
    assert model.training
    assert not model.layer.training
    assert model.seen is seen
    assert model.table is table
    assert (seen, table) == ([1], {"a": 1})
    assert not model.layer._forward_hooks
    assert [name for name, _ in model.named_children()] == ["layer"]


def test_torch_flags_come_back():
    def flags():
        backends = torch.backends.cuda
        return (
            backends.flash_sdp_enabled(),
            backends.math_sdp_enabled(),
            backends.mem_efficient_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        )

    before = flags()
    with plain_attention(nn.Linear(1, 1)):
        assert flags() == (False, True, False, False)
    assert flags() == before
    with pytest.raises(KeyError), plain_attention(nn.Linear(1, 1)):
        raise KeyError
    assert flags() == before
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        inside = flags()
        with plain_attention(nn.Linear(1, 1)):
            pass
        assert flags() == inside


def test_scaled_dot_product_attention_under_vmap_does_not_warn():
    def f(q, k, v):
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True).sum()

    q, k, v = torch.randn(3, 4, 2, 5, 8)
    with plain_attention(nn.Linear(1, 1)):
        grads = torch.func.vmap(torch.func.grad(f))(q, k, v)
    q.requires_grad_()
    expected = torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True).sum(), q)
    torch.testing.assert_close(grads, expected[0])


def test_modules_with_a_config_of_another_kind_are_left_alone():
    model = nn.Linear(1, 1)
    model.config = {"use_cache": True}
    with plain_attention(model):
        assert model.config == {"use_cache": True}


def hugging_face():
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 9, "max_position_embeddings": 4},
        vision_config={**tower, "image_size": 4, "patch_size": 2},
        projection_dim=4,
    )
    clip = transformers.CLIPModel(config)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=4)
    )
    return {"clip": clip, "gpt2": gpt2}


@pytest.mark.parametrize("name", ["clip", "gpt2"])
def test_configs_of_hugging_face_come_back(name):
    masking = pytest.importorskip("transformers.masking_utils")
    model = hugging_face()[name]
    if name == "clip":  # towers may differ
        model.config.vision_config._attn_implementation = "eager"
    before = model.config.to_dict()
    held = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    implementations = {
        id(module): module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "config")
    }
    assert "sdpa" in implementations.values()
    make_mask = masking.ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    with plain_attention(model):
        for module in model.modules():
            if hasattr(module, "config"):
                assert module.config._attn_implementation == "eager"
                assert getattr(module.config, "use_cache", False) is False
        assert masking.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is not make_mask
    assert model.config.to_dict() == before
    assert held == {id(module.config) for module in model.modules() if hasattr(module, "config")}
    for module in model.modules():
        if id(module) in implementations:
            assert module.config._attn_implementation == implementations[id(module)]
    assert masking.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is make_mask
    assert masking.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping == {}


def test_masks_that_someone_else_replaced_come_back():
    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    ours = lambda **given: None  # noqa: E731
    masks["eager"] = ours
    try:
        with plain_attention(hugging_face()["gpt2"]):
            assert masks["eager"] is not ours
        assert masks["eager"] is ours
    finally:
        del masks["eager"]


def test_an_old_transformers_is_named_where_it_is_the_cause(monkeypatch):
    class Config:
        _attn_implementation = "eager"

    model = Model()
    assert old_transformers(model) == ""
    model.config = Config()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.51.3")
    assert "transformers 4.51.3 is installed" in old_transformers(model)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.2.0")
    assert old_transformers(model) == ""
