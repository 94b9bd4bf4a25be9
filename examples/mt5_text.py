"""A small mT5 that names functions from their docstrings: which pairs taught it this name?

pip install transformers
python examples/mt5_text.py --out mt5_out
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import common
import subwords
import torch
import transformers
from torch import nn

from docstrings import PACKAGES, Text, package_texts
from trak_ext import Attributor, report

SOURCE, NAME = 32, 10  # tokens at most


def words(text: Text) -> str:
    """Return a function's or class's own name as words: "read csv" for read_csv."""
    name = text.name.rsplit(".", 1)[1]
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return name.replace("_", " ").strip().lower()


def main(arguments: Sequence[str] | None = None) -> report.Attributions:
    """Train, attribute, print and write."""
    options = common.parse(str(__doc__).splitlines()[0], arguments)
    if options.quick:
        packages, a_package, size, width = PACKAGES[:1], 120, 600, 32
        epochs, checkpoints, count = 3, 2, 6
    else:
        packages, a_package, size, width = PACKAGES, 250, 2000, 96
        epochs, checkpoints, count = 12, 3, 40
    transformers.logging.set_verbosity_error()
    pool = [text for package in packages for text in package_texts(package, a_package)]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, kept = ([pool[i] for i in part] for part in (order[:count], order[count:]))
    tokenizer = subwords.learn([f"{text.text}\n{words(text)}" for text in kept], size)

    def columns(texts: list[Text]) -> common.Columns:
        def encode(pieces, length: int) -> common.Columns:
            ids = [[*tokenizer.encode(piece).ids[: length - 1], subwords.END] for piece in pieces]
            return subwords.rows(ids, length)

        names = encode((words(text) for text in texts), NAME)
        return {
            **encode((text.text for text in texts), SOURCE),
            "labels": subwords.as_labels(names),
        }

    def make_model() -> nn.Module:
        config = transformers.MT5Config(
            vocab_size=tokenizer.get_vocab_size(), d_model=width, d_kv=width // 4, d_ff=2 * width,
            num_layers=2, num_heads=4, pad_token_id=subwords.PAD, eos_token_id=subwords.END,
            decoder_start_token_id=subwords.PAD,
        )  # fmt: skip
        return transformers.MT5ForConditionalGeneration(config)

    train, test = columns(kept), columns(held_out)
    states = [
        common.train(make_model, train, common.hugging_face_loss, seed=seed, epochs=epochs, lr=3e-3)
        for seed in range(checkpoints)
    ]

    model = make_model()
    attributor = Attributor(model, "seq2seq_lm", checkpoints=states, proj_dim=512, progress=False)
    attributor.fit(common.loader(train))
    proponents, opponents = common.top_both(attributor, test, 5)

    model.load_state_dict(states[0])
    inputs = {name: test[name] for name in ("input_ids", "attention_mask")}
    generated = model.eval().generate(**inputs, max_new_tokens=NAME, do_sample=False)
    said = [tokenizer.decode(row, skip_special_tokens=True) for row in generated.tolist()]

    def item(text: Text, prediction: str | None = None) -> report.Item:
        return report.Item(
            text=text.text, id=text.name, caption=f"→ {words(text)}", prediction=prediction
        )

    attributions = report.Attributions(
        [item(text, prediction) for text, prediction in zip(held_out, said, strict=True)],
        proponents,
        opponents,
        [item(text) for text in kept],
        title="Which pairs taught it this name?",
        note=f"A small mT5 trained {checkpoints} times on {len(kept):,} pairs of a docstring's "
        "first sentence and the name of its function or class.",
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )
    common.finish(options.out, attributions, shown=6)
    return attributions


if __name__ == "__main__":
    main()
