"""Two towers trained like CLIP on digits and captions: which pairs taught it that this one fits?

    python examples/clip_digits.py --out clip_out

Captions say what the digit is and how it was written, which is computed from the picture:
"a bold slanted handwritten three".
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

from trak_ext import Attributor, report
from trak_ext.demo import digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "", "bold")
SLANTS = ("backward", "", "slanted")
WORDS = ["", "a", "handwritten", *NAMES, "thin", "bold", "backward", "slanted"]
LENGTH = 5  # words of the longest caption


def captions(images: Tensor, labels: Tensor) -> list[str]:
    """Describe pictures [n, 8, 8]: thirds by ink, thirds by how far strokes lean to the right."""
    ink = images.sum((1, 2))
    axis = torch.arange(8.0) - 3.5
    share = images / ink[:, None, None]
    x = (share * axis).sum((1, 2))[:, None, None]
    y = (share * axis[:, None]).sum((1, 2))[:, None, None]
    # Rows run downwards, so a stroke that leans to the right has x fall as y grows.
    lean = -(share * (axis - x) * (axis[:, None] - y)).sum((1, 2))
    thirds = [
        torch.bucketize(value, value.quantile(torch.tensor([1 / 3, 2 / 3])))
        for value in (ink, lean)
    ]
    rows = zip(*(third.tolist() for third in thirds), labels.tolist(), strict=True)
    words = (["a", WEIGHTS[w], SLANTS[s], "handwritten", NAMES[label]] for w, s, label in rows)
    return [" ".join(filter(None, row)) for row in words]


def tokens(texts: list[str]) -> Tensor:
    """Return word numbers [n, 5], 0 where a caption is shorter."""
    rows = [[WORDS.index(word) for word in text.split()] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


class TwoTowers(nn.Module):
    """A convolutional tower for pictures and one that adds up words, into 32 dimensions each."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 32),
        )  # fmt: skip
        self.words = nn.Embedding(len(WORDS), 32, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of pictures [B, 64] and captions [B, 5]: two of [B, 32]."""
        return self.image(pixels), self.text(self.words(words).sum(1))


def similarity(model: nn.Module, batch: common.Columns) -> Tensor:
    """Return the scaled cosine of every picture with every caption, [B, B]."""
    image, text = (nn.functional.normalize(part, dim=1) for part in model(**batch))
    return model.logit_scale.exp() * image @ text.T


def loss(model: nn.Module, batch: common.Columns) -> Tensor:
    """Return CLIP's loss: the right caption among the batch's, and the right picture."""
    logits = similarity(model, batch)
    right = torch.arange(len(logits))
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2


def main(arguments: Sequence[str] | None = None) -> report.Attributions:
    """Train, attribute, print and write."""
    options = common.parse(str(__doc__).splitlines()[0], arguments)
    num_train, epochs, checkpoints, count = (300, 8, 2, 8) if options.quick else (1200, 30, 5, 40)
    split = digits.load_digits_split(num_train, seed=0)
    images = [split.images(inputs) for inputs in (split.train_inputs, split.test_inputs)]
    texts = captions(torch.cat(images), torch.cat([split.train_labels, split.test_labels]))
    train = {"pixels": split.train_inputs, "words": tokens(texts[:num_train])}
    test = {"pixels": split.test_inputs[:count], "words": tokens(texts[num_train:][:count])}
    states = [
        common.train(TwoTowers, train, loss, seed=seed, epochs=epochs, lr=3e-3, batch_size=64)
        for seed in range(checkpoints)
    ]

    model = TwoTowers()
    attributor = Attributor(model, "clip", checkpoints=states, proj_dim=512, progress=False)
    attributor.fit(common.loader(train))
    proponents, opponents = common.top_both(attributor, test, 4)

    model.load_state_dict(states[0])
    every = sorted(set(texts))
    with torch.no_grad():
        image, _ = model(**test)
        text = model.text(model.words(tokens(every)).sum(1))
        found = (image @ nn.functional.normalize(text, dim=1).T).argmax(1).tolist()
    targets = [
        report.Item(
            1 - images[1][i],
            caption=f"{texts[num_train + i]}; the model would rather say: {every[found[i]]}"
            if every[found[i]] != texts[num_train + i]
            else texts[num_train + i],
            label=NAMES[split.test_labels[i]],
            prediction=every[found[i]].split()[-1],
            id=f"Test pair {i}",
        )
        for i in range(count)
    ]
    attributions = report.Attributions(
        targets,
        proponents,
        opponents,
        [
            report.Item(1 - images[0][i], caption=texts[i], label=NAMES[split.train_labels[i]])
            for i in range(num_train)
        ],
        title="Which pairs taught it that this caption fits?",
        note=f"Two small towers trained {checkpoints} times on {num_train:,} digits with captions. "
        "A pair's output is how well it is told from other pairs of the training set.",
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )
    same = common.agreement(attributions, lambda item: item.label)
    print(f"{same:.0%} of the proponents show their target's digit (by chance: 10%)")
    common.finish(options.out, attributions)
    return attributions


if __name__ == "__main__":
    main()
