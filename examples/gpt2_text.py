"""A small GPT-2 trained on docstrings: which ones made it say this sentence, or this one word?

    pip install transformers
    python examples/gpt2_text.py --out gpt2_out

Sentences are attributed as a whole (task causal_lm) and by the word that the model is surest of
(target_task causal_lm_token), from the same fitted features.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import subwords
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from docstrings import PACKAGES, package_texts
from trak_ext import Attributor, TopK, report
from trak_ext.tasks import token_targets

LENGTH = 32  # tokens of a sentence at most


def surest_words(
    model: nn.Module, test: common.Columns, tokenizer: Tokenizer
) -> tuple[common.Columns, Tensor]:
    """Choose of every sentence the word of five letters or more that the model is surest of.

    Returns rows for causal_lm_token, one a sentence, and the probabilities [sentences].
    """
    tokens, sample = token_targets(test, causal=True)  # a row for every token of every sentence
    position = tokens["target_position"]
    inputs = {name: test[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    token = test["input_ids"][sample, position]
    probability = logits[sample, position - 1].softmax(1)[range(len(token)), token]
    words = [tokenizer.decode([i]).strip() for i in token.tolist()]
    is_telling = torch.tensor([word.isalpha() and len(word) > 4 for word in words])
    # From the third token on, where there is something to go by.
    probability = probability.masked_fill(~is_telling | (position < 3), 0.0)
    chosen = torch.stack(
        [torch.where(sample == i, probability, -1.0).argmax() for i in range(len(test["labels"]))]
    )
    return {name: part[chosen] for name, part in tokens.items()}, probability[chosen]


def interleaved(first: TopK, second: TopK) -> TopK:
    """Return the rows of two in turn: first 0, second 0, first 1, ..."""
    pairs = zip(first, second, strict=True)
    return TopK(*(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))


def main(arguments: Sequence[str] | None = None) -> report.Attributions:
    """Train, attribute, print and write."""
    options = common.parse(str(__doc__).splitlines()[0], arguments)
    if options.quick:
        packages, a_package, size, width = PACKAGES[:1], 160, 600, 48
        epochs, checkpoints, count = 4, 2, 4
    else:
        packages, a_package, size, width = PACKAGES, 250, 2000, 128
        epochs, checkpoints, count = 8, 3, 20
    transformers.logging.set_verbosity_error()
    pool = [text for package in packages for text in package_texts(package, a_package)]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, kept = ([pool[i] for i in part] for part in (order[:count], order[count:]))
    tokenizer = subwords.learn([text.text for text in kept], size)

    def columns(texts) -> common.Columns:
        sequences = [
            [subwords.START, *tokenizer.encode(text.text).ids, subwords.END] for text in texts
        ]
        made = subwords.rows(sequences, LENGTH)
        return {**made, "labels": subwords.as_labels(made)}

    def make_model() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=tokenizer.get_vocab_size(), n_positions=LENGTH, n_embd=width, n_layer=3,
            n_head=4, bos_token_id=subwords.START, eos_token_id=subwords.END,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)

    train, test = columns(kept), columns(held_out)
    states = [
        common.train(make_model, train, common.hugging_face_loss, seed=seed, epochs=epochs, lr=2e-3)
        for seed in range(checkpoints)
    ]

    model = make_model()
    attributor = Attributor(model, "causal_lm", checkpoints=states, proj_dim=512, progress=False)
    attributor.fit(common.loader(train))
    whole = common.top_both(attributor, test, 5)

    model.load_state_dict(states[0])
    words, probability = surest_words(model, test, tokenizer)
    one = common.top_both(attributor, words, 5, target_task="causal_lm_token")

    targets = []
    for i, text in enumerate(held_out):
        targets.append(report.Item(text=text.text, id=f"Sentence {i}", caption=text.name))
    for i, text in enumerate(held_out):
        # Token 0 is the start; offsets count from the sentence's own first token.
        span = tokenizer.encode(text.text).offsets[int(words["target_position"][i]) - 1]
        targets.append(
            report.Item(
                text=text.text,
                id=f"Sentence {i}, one word",
                highlight=span,
                caption=f"the model gives it a probability of {float(probability[i]):.0%}",
            )
        )
    attributions = report.Attributions(
        [targets[j] for i in range(count) for j in (i, count + i)],
        *(interleaved(first, second) for first, second in zip(whole, one, strict=True)),
        [report.Item(text=text.text, id=text.name) for text in kept],
        title="Which docstrings made it say this?",
        note=f"A GPT-2 of three layers trained {checkpoints} times on {len(kept):,} first "
        "sentences of docstrings. Each held-out sentence is attributed whole, then by one word.",
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )
    common.finish(options.out, attributions, shown=6)
    return attributions


if __name__ == "__main__":
    main()
