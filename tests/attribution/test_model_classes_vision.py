"""Image classifiers people use, under Attributor, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import brute_force

transformers = pytest.importorskip("transformers")

CLASSES = 3


def images(count, size, key="pixel_values"):
    return {
        key: torch.randn(count, 3, size, size),
        "labels": torch.randint(0, CLASSES, (count,)),
    }


class Block(nn.Module):
    """A residual block with BatchNorm, as torchvision's and timm's ResNets have."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class PlainResNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            Block(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x):
        return super().forward(x)


class PlainViT(nn.Module):
    """Patches, a class token, and torch's own encoder layers (nn.MultiheadAttention)."""

    def __init__(self, size=8, width=16):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2 + 1, width))
        layers = [
            nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True)
            for _ in range(2)
        ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        patches = self.patch(x).flatten(2).transpose(1, 2)
        token = self.token.expand(len(x), -1, -1)
        return self.head(self.layers(torch.cat([token, patches], 1) + self.position)[:, 0])


class TimmAttention(nn.Module):
    """Attention as timm writes it: one qkv layer and scaled_dot_product_attention."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(count, length, width))


class TimmViT(PlainViT):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(16), TimmAttention(), nn.LayerNorm(16))


def hf_resnet():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="bottleneck",
            num_labels=CLASSES,
        )
    )


def hf_vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    )


HUGGING_FACE = {"resnet": (hf_resnet, 32), "vit": (hf_vit, 8)}
PLAIN = {"resnet": (PlainResNet, 16), "vit": (PlainViT, 8), "timm vit": (TimmViT, 8)}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models(name):
    make, size = HUGGING_FACE[name]
    train, targets = [images(5, size), images(4, size)], [images(3, size)]
    brute_force.assert_scores(
        make(), "image_classification", train, targets, brute_force.classification
    )


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_plain_modules(name, mode):
    make, size = PLAIN[name]
    model = getattr(make(), mode)()  # whatever it is in, it is used in eval mode
    train, targets = [images(5, size, "x"), images(4, size, "x")], [images(3, size, "x")]
    brute_force.assert_scores(
        model, "image_classification", train, targets, brute_force.classification, pairs=True
    )
    assert all(module.training == (mode == "train") for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "timm vit"])
def test_attention_of_parameters_that_are_not_chosen(name):
    # Nothing in the attention requires a gradient: torch would take its fast path.
    make, size = PLAIN[name]
    train, targets = [images(6, size, "x")], [images(3, size, "x")]
    brute_force.assert_scores(
        make().eval(),
        "image_classification",
        train,
        targets,
        brute_force.classification,
        params="head.*",
        names=["head.weight", "head.bias"],
        pairs=True,
    )
