"""Scores by brute force in fp64, to hold Attributor against; shares `trak_ext.reference` alone.

One torch.autograd.grad a sample on a model in fp64, without padding, the matrix written out and a
dense solve. Model output functions are written again here, from the probabilities.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from trak_ext import Attributor, reference

PROJ_DIM = 16


def log_odds(logits, label):
    """log p - log(1-p) of one row of fp64 logits."""
    p = logits.softmax(-1)[label]
    return p.log() - torch.log1p(-p)


def classification(model, sample):
    """f and Q of one sample, a batch of one."""
    sample = dict(sample)
    label = sample.pop("labels")[0]
    f = log_odds(logits_of(model(**sample))[0], label)
    return f, 1 - torch.sigmoid(f)


def causal_lm(model, sample):
    labels = sample["labels"][0]
    inputs = {key: value for key, value in sample.items() if key != "labels"}
    logits = logits_of(model(**inputs))[0]
    return over_tokens([(logits[t - 1], labels[t]) for t in range(1, len(labels))])


def seq2seq_lm(model, sample):
    labels = sample["labels"][0]
    logits = logits_of(model(**sample))[0]  # the model shifts the labels itself
    return over_tokens(list(zip(logits, labels, strict=True)))


def over_tokens(pairs):
    terms = [log_odds(logits, label) for logits, label in pairs if label != -100]
    return sum(terms), torch.stack([1 - torch.sigmoid(term) for term in terms]).mean()


def logits_of(result):
    return result if isinstance(result, torch.Tensor) else result.logits


def without_padding(sample):
    """A batch of one less what its attention_mask masks, and labels less what ends in -100."""
    cut = dict(sample)
    mask = sample.get("attention_mask")
    if mask is not None:
        length = int(mask.sum())
        for key, value in sample.items():
            if value.dim() == 2 and value.shape == mask.shape:
                cut[key] = value[:, :length]
    labels = cut.get("labels")
    if labels is not None and labels.dim() == 2:
        cut["labels"] = labels[:, : int((labels[0] != -100).nonzero()[-1]) + 1]
    return cut


def rows(batches):
    """Every sample of a list of mappings, as batches of one."""
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {key: value[i : i + 1] for key, value in batch.items()}


def doubled(sample):
    return {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}


def in_double(model, state):
    """The model in fp64 and eval mode under a state dict."""
    model = copy.deepcopy(model).double()
    model.load_state_dict(state)
    return model.eval()


def gradients(model, batches, output, names=None):
    """Gradients [n, P], f [n] and Q [n] of a model in fp64."""
    named = dict(model.named_parameters())
    names = [n for n, p in named.items() if p.requires_grad] if names is None else names
    chosen = [named[name] for name in names]
    collected = []
    for sample in rows(batches):
        f, q = output(model, without_padding(doubled(sample)))
        grads = torch.autograd.grad(f, chosen, allow_unused=True, materialize_grads=True)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        collected.append((flat.numpy(), float(f.detach()), float(q.detach())))
    grads, f, q = zip(*collected, strict=True)
    return np.stack(grads), np.array(f), np.array(q)


def scores(model, states, train, targets, output, *, names=None, proj_dim=PROJ_DIM):
    """Scores [n, t] with damping 1 and seed 0, the mean over checkpoints of each factor apart."""
    influence, weights = 0, 0
    for m, state in enumerate(states):
        double = in_double(model, state)
        g, _, q = gradients(double, train, output, names)
        g_target, _, _ = gradients(double, targets, output, names)
        matrix = reference.projection_matrix(g.shape[1], proj_dim, kind="sjlt", model_id=m)
        phi, phi_target = g @ matrix, g_target @ matrix
        kernel = phi.T @ phi
        kernel += np.trace(kernel) / proj_dim * np.eye(proj_dim)
        influence = influence + phi @ np.linalg.solve(kernel, phi_target.T) / len(states)
        weights = weights + q / len(states)
    return influence * weights[:, None]


def checkpoints(model, count=2, spread=0.05):
    """State dicts of a model moved at random; running figures of BatchNorm among them."""
    states = []
    for _ in range(count):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in changed.parameters():
                tensor.add_(spread * torch.randn_like(tensor))
            for name, tensor in changed.named_buffers():
                if "running_var" in name:
                    tensor.uniform_(0.5, 1.5)
                elif "running_mean" in name:
                    tensor.normal_(0, 0.3)
        states.append({name: tensor.clone() for name, tensor in changed.state_dict().items()})
    return states


def assert_scores(
    model, task, train, targets, output, *, params=None, names=None, pairs=False, **options
):
    """Attributor's scores for two checkpoints are those of brute force, for every target.

    With `pairs`, Attributor is given (the first value, labels) of each mapping.
    """
    states = checkpoints(model)
    expected = scores(model, states, train, targets, output, names=names)
    attributor = Attributor(
        model,
        task,
        checkpoints=states,
        proj_dim=PROJ_DIM,
        params=params,
        damping=1.0,
        curvature=None,
        progress=False,
        **options,
    )
    if pairs:
        train, targets = ([tuple(batch.values()) for batch in part] for part in (train, targets))
    attributor.fit(train)
    got = attributor.attribute(targets).double().numpy()
    assert got.shape == expected.shape
    assert_close_by_target(got, expected)


def assert_close_by_target(got, expected, tolerance=1e-4):
    largest = np.abs(expected).max(0)
    assert (largest > 0).all()
    error = np.abs(got - expected).max(0) / largest
    assert (error <= tolerance).all(), error
