"""What the walk-throughs share: arguments, a training loop, and what is printed and written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trak_ext import Attributor, TopK, report

Columns = dict[str, Tensor]  # name -> [samples, ...]
State = dict[str, Tensor]


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read --out and --quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html and bundle")
    parser.add_argument("--quick", action="store_true", help="a short form, in seconds")
    return parser.parse_args(arguments)


def loader(columns: Columns, batch_size: int = 64) -> list[Columns]:
    """Cut columns into batches, in order: Attributor knows a sample by its position."""
    count = len(next(iter(columns.values())))
    starts = range(0, count, batch_size)
    return [{name: part[i : i + batch_size] for name, part in columns.items()} for i in starts]


def train(
    make_model: Callable[[], nn.Module],
    columns: Columns,
    loss: Callable[[nn.Module, Columns], Tensor],
    *,
    seed: int,
    epochs: int,
    lr: float,
    batch_size: int = 32,
) -> State:
    """Train one model with AdamW and a learning rate that falls to zero; return its weights.

    The seed decides the first weights and the order of the samples, so that several seeds make
    several checkpoints of one recipe.
    """
    torch.manual_seed(seed)
    model = make_model().train()
    count = len(next(iter(columns.values())))
    steps = epochs * -(-count // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(count).split(batch_size):
            value = loss(model, {name: part[index] for name, part in columns.items()})
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(value.detach()) * len(index) / count
    print(f"checkpoint with seed {seed}: training loss {total:.3f} in the last epoch", flush=True)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def hugging_face_loss(model: nn.Module, batch: Columns) -> Tensor:
    """Return the loss that a Hugging Face model computes where it is given labels."""
    loss: Tensor = model(**batch).loss
    return loss


def top_both(attributor: Attributor, targets: Columns, count: int, **options) -> tuple[TopK, TopK]:
    """Return the proponents and the opponents of every target, best first."""
    batches = loader(targets)
    return (
        attributor.attribute(batches, top_k=count, **options),
        attributor.attribute(batches, top_k=count, largest=False, **options),
    )


def finish(out: Path, attributions: report.Attributions, shown: int = 3) -> None:
    """Print the first targets with their proponents; write report.html and the bundle."""
    for i, target in enumerate(attributions.targets[:shown]):
        print(f"\n{describe(target)}")
        ranked = zip(
            attributions.proponents.values[i], attributions.proponents.indices[i], strict=True
        )
        for score, index in list(ranked)[:3]:
            train_item = attributions.train_items[int(index)]
            print(f"  {score:+.2e}  no. {index} | {describe(train_item)}")
    report.save_bundle(out / "bundle", attributions)
    report.write_report(out / "report.html", attributions)
    print(f"\nwrote {out / 'report.html'} and {out / 'bundle'}")


def describe(item: report.Item) -> str:
    """Return an item as one line."""
    text = item.text
    if text is not None and item.highlight is not None:
        start, stop = item.highlight
        text = f"{text[:start]}[{text[start:stop]}]{text[stop:]}"
    says = None if item.prediction is None else f"model says {item.prediction}"
    label = None if item.label is None else f"label {item.label}"
    parts = [item.id, label, says, item.caption, text]
    return " | ".join(str(part) for part in parts if part is not None)


def agreement(attributions: report.Attributions, key: Callable[[report.Item], object]) -> float:
    """Return the share of proponents whose key is that of their target."""
    rows = zip(attributions.targets, attributions.proponents.indices.tolist(), strict=True)
    same = [key(attributions.train_items[i]) == key(target) for target, row in rows for i in row]
    return sum(same) / len(same)
