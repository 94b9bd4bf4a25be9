"""CLIP and plain two-tower modules: gradients and scores against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import brute_force
from trak_ext import Attributor, reference
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import clip_task, get_task

transformers = pytest.importorskip("transformers")

VOCABULARY = 40
END = VOCABULARY - 1


def captions(lengths):
    """A batch as CLIP's processor makes it: images, and texts that end in the highest id."""
    width = max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, END, mask.shape)
    last = torch.arange(width)[None] == torch.tensor(lengths)[:, None] - 1
    return {
        "input_ids": torch.where(last, END, torch.where(mask, ids, 0)),
        "attention_mask": mask.long(),
        "pixel_values": torch.randn(len(lengths), 3, 8, 8),
    }


def hf_clip(end_token=END):
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.CLIPConfig(
        text_config=dict(
            tower,
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
            eos_token_id=end_token,
            bos_token_id=0,
            pad_token_id=0,
        ),
        vision_config=dict(tower, image_size=8, patch_size=4),
        projection_dim=12,
    )
    return transformers.CLIPModel(config)


class TwoTowers(nn.Module):
    """Returns the two embeddings, not normalised."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.Tanh(), nn.Linear(10, 6))
        self.text = nn.EmbeddingBag(VOCABULARY, 6)
        self.logit_scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, images, texts):
        return self.image(images), self.text.weight[texts].mean(1)


class OpenClip(TwoTowers):
    """As open_clip's and OpenAI's: two methods; forward gives the similarities of a batch."""

    def encode_image(self, images):
        return self.image(images)

    def encode_text(self, texts):
        return self.text.weight[texts].mean(1)

    def forward(self, images, texts):
        raise AssertionError("its result is not the embeddings")


def plain_pairs(count):
    return {
        "images": torch.randn(count, 3, 4, 4),
        "texts": torch.randint(0, VOCABULARY, (count, 5)),
    }


def normalised(model, sample):
    if hasattr(model, "encode_image"):
        image, text = model.encode_image(sample["images"]), model.encode_text(sample["texts"])
    elif isinstance(model, TwoTowers):
        image, text = model(**sample)
    else:
        result = model(**sample)
        image, text = result.image_embeds, result.text_embeds
    return image[0] / image[0].norm(), text[0] / text[0].norm()


def clip_by_hand(model, train, positions):
    """An output function of (sample, its position): f and Q of Park et al. 2023, by pairs."""
    with torch.no_grad():
        everyone = [
            normalised(model, brute_force.without_padding(brute_force.doubled(sample)))
            for sample in brute_force.rows(train)
        ]

    def output(model, sample, own):
        s = model.logit_scale.exp()
        image, text = normalised(model, sample)
        others = [everyone[j] for j in positions if j != own]
        f_image = -torch.stack([-s * (image @ (text - t)) for _, t in others]).logsumexp(0)
        f_text = -torch.stack([-s * ((image - i) @ text) for i, _ in others]).logsumexp(0)
        among_texts = torch.stack([s * (image @ t) for _, t in [(image, text), *others]])
        among_images = torch.stack([s * (i @ text) for i, _ in [(image, text), *others]])
        p_image, p_text = among_texts.softmax(0)[0], among_images.softmax(0)[0]
        return f_image + f_text, 1 - (p_image + p_text) / 2

    return output


def by_hand(model, batches, output, own):
    """Gradients [n, P], f and Q [n] in fp64; own[i] is sample i's place in the training set."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i, sample in enumerate(brute_force.rows(batches)):
        f, q = output(model, brute_force.without_padding(brute_force.doubled(sample)), own[i])
        grads = torch.autograd.grad(f, chosen, allow_unused=True, materialize_grads=True)
        flat = torch.cat([grad.reshape(-1) for grad in grads]).numpy()
        rows.append((flat, f.item(), q.item()))
    grads, f, q = zip(*rows, strict=True)
    return np.stack(grads), np.array(f), np.array(q)


CASES = {
    "transformers": (
        hf_clip,
        [captions([5, 3, 6]), captions([4, 7]), captions([2, 2, 5])],
        [captions([6, 3])],
    ),
    "two towers": (TwoTowers, [plain_pairs(5), plain_pairs(3)], [plain_pairs(3)]),
    "open_clip": (OpenClip, [plain_pairs(5), plain_pairs(3)], [plain_pairs(3)]),
}


def as_given(batches, model):
    """Mappings for transformers, pairs for plain modules."""
    return batches if not isinstance(model, TwoTowers) else [tuple(b.values()) for b in batches]


def with_starts(batches):
    position = 0
    for batch in batches:
        yield position, batch
        position += len(batch["input_ids"] if isinstance(batch, dict) else batch[0])


@pytest.mark.parametrize("num_negatives", [3, 128])
@pytest.mark.parametrize("name", CASES)
def test_gradients_f_and_q(name, num_negatives):
    make, train, targets = CASES[name]
    model = make()
    task = clip_task(num_negatives)
    computer = GradientComputer(model, task)
    for m, state in enumerate(brute_force.checkpoints(model)):
        double = brute_force.in_double(model, state)
        context = computer.prepare(state, with_starts(as_given(train, model)), m)
        positions = context["positions"].tolist()
        assert len(positions) == min(num_negatives, 8)
        output = clip_by_hand(double, train, positions)
        for batches, own in ((train, range(8)), (targets, [-1] * 3)):
            expected = by_hand(double, batches, output, own)
            got = [[], [], []]
            for start, batch in with_starts(as_given(batches, model)):
                size = len(batch["input_ids"] if isinstance(batch, dict) else batch[0])
                index = torch.tensor(list(own)[start : start + size])
                for part in computer(state, batch, context, index):
                    flat = [grad.reshape(len(grad), -1) for grad in part.grads.values()]
                    got[0].append(torch.cat(flat, 1))
                    got[1].append(part.output)
                    got[2].append(part.weight)
            for parts, reference_values in zip(got, expected, strict=True):
                found = torch.cat(parts).double().numpy()
                scale = np.abs(reference_values).max(-1, keepdims=True)
                assert (np.abs(found - reference_values) <= 1e-4 * scale).all()


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
    make, train, targets = CASES[name]
    model = make()
    states = brute_force.checkpoints(model)
    influence, weights = 0, 0
    for m, state in enumerate(states):
        double = brute_force.in_double(model, state)
        output = clip_by_hand(double, train, range(8))  # all: fewer than 128
        g, _, q = by_hand(double, train, output, range(8))
        g_target, _, _ = by_hand(double, targets, output, [-1] * 3)
        matrix = reference.projection_matrix(
            g.shape[1], brute_force.PROJ_DIM, kind="sjlt", model_id=m
        )
        phi, phi_target = g @ matrix, g_target @ matrix
        kernel = phi.T @ phi
        kernel += np.trace(kernel) / len(kernel) * np.eye(len(kernel))
        influence = influence + phi @ np.linalg.solve(kernel, phi_target.T) / len(states)
        weights = weights + q / len(states)
    attributor = Attributor(
        model,
        "clip",
        checkpoints=states,
        proj_dim=brute_force.PROJ_DIM,
        damping=1.0,
        curvature=None,
        progress=False,
    )
    attributor.fit(as_given(train, model))
    got = attributor.attribute(as_given(targets, model)).double().numpy()
    brute_force.assert_close_by_target(got, influence * weights[:, None])


def test_transformers_way_of_old_configs_to_find_the_end_of_a_text():
    # eos_token_id 2 in a config of CLIP means the highest id of the text.
    model = hf_clip(end_token=2)
    batch = captions([5, 3, 6])
    task = get_task("clip")
    computer = GradientComputer(model, task)
    context = computer.prepare({}, [(0, batch)], 0)
    (part,) = computer({}, batch, context, torch.arange(3))
    assert part.output.isfinite().all()


def test_embeddings_of_transformers_are_normalised_already():
    result = hf_clip().eval()(**captions([5, 3]))
    torch.testing.assert_close(result.image_embeds.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(result.text_embeds.norm(dim=1), torch.ones(2))
