"""A convolutional network on handwritten digits: which training digits made it say this?

python examples/digits_cnn.py --out digits_out
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

from trak_ext import Attributor, report
from trak_ext.demo import digits, figure


def make_model() -> nn.Module:
    """Two convolutions and a linear layer; 8 x 8 pixels in, 10 classes out."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: common.Columns) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(model(batch["input"]), batch["labels"])


def main(arguments: Sequence[str] | None = None) -> report.Attributions:
    """Train, attribute, print and write."""
    options = common.parse(str(__doc__).splitlines()[0], arguments)
    num_train, epochs, checkpoints = (300, 10, 2) if options.quick else (1200, 8, 5)
    split = digits.load_digits_split(num_train, seed=0)
    # Three labels are wrong on purpose: self-influence should find them.
    labels = split.train_labels.clone()
    labels[:3] = (labels[:3] + 5) % 10
    train = {"input": split.train_inputs, "labels": labels}
    states = [
        common.train(make_model, train, loss, seed=seed, epochs=epochs, lr=4e-3)
        for seed in range(checkpoints)
    ]

    model = make_model()
    attributor = Attributor(
        model, "image_classification", checkpoints=states, proj_dim=512, progress=False
    )
    attributor.fit(common.loader(train))

    model.load_state_dict(states[0])
    with torch.no_grad():
        predictions = model(split.test_inputs).argmax(1)
    accuracy = float((predictions == split.test_labels).float().mean())
    print(f"test accuracy {accuracy:.3f}")
    shown = figure.choose_targets(split.test_labels, predictions, 12 if options.quick else 40)
    targets = {"input": split.test_inputs[shown], "labels": split.test_labels[shown]}
    proponents, opponents = common.top_both(attributor, targets, 5)

    suspicious = attributor.self_influence().topk(10).indices.tolist()
    print(f"labels most at odds with the rest (0, 1 and 2 are wrong on purpose): {suspicious}")

    train_images, test_images = (
        1 - split.images(inputs) for inputs in (split.train_inputs, split.test_inputs)
    )
    attributions = report.Attributions(
        [
            report.Item(
                test_images[i],
                label=int(split.test_labels[i]),
                prediction=int(predictions[i]),
                id=f"Test digit {i}",
            )
            for i in shown.tolist()
        ],
        proponents,
        opponents,
        [
            report.Item(image, label=int(label))
            for image, label in zip(train_images, labels, strict=True)
        ],
        note=f"A small convolutional network, trained {checkpoints} times on {num_train:,} digits "
        f"of scikit-learn; it gets {accuracy:.1%} of the test digits right.",
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )
    same = common.agreement(attributions, lambda item: item.label)
    print(f"{same:.0%} of the proponents have their target's label (by chance: 10%)")
    common.finish(options.out, attributions)
    return attributions


if __name__ == "__main__":
    main()
