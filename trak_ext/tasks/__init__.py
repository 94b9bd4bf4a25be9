"""Model output functions: what is attributed, and how the loss moves with it."""

from __future__ import annotations

from typing import Any

from .classification import (
    binary_classification,
    binary_output,
    classification,
    classification_output,
    multilabel_classification,
    multilabel_output,
)
from .contrastive import clip_output, clip_task
from .core import ModelOutput, Task
from .language import (
    causal_lm,
    causal_lm_token,
    check_causal,
    seq2seq_lm,
    seq2seq_lm_token,
    token_targets,
)
from .pixels import pixel, pixel_classification, pixel_targets
from .regression import regression

__all__ = [
    "TASKS",
    "ModelOutput",
    "Task",
    "binary_output",
    "classification_output",
    "clip_output",
    "clip_task",
    "get_task",
    "multilabel_output",
    "pixel_targets",
    "token_targets",
]

# Other names of ids, which no model takes; and the third of (inputs, labels, ids), where it is not
# the target's position.
_IDS: dict[str, Any] = {"ids_as": ("idx", "id", 2)}
_KEYS: dict[str, Any] = {"ids_as": ("idx", "id")}

TASKS = {
    task.name: task
    for task in (
        Task("image_classification", classification, log_odds=True, **_IDS),
        Task("text_classification", classification, log_odds=True, **_IDS),
        Task("binary_classification", binary_classification, log_odds=True, **_IDS),
        Task("multilabel_classification", multilabel_classification, **_IDS),
        Task("regression", regression, **_IDS),
        Task("causal_lm", causal_lm, check=check_causal, **_IDS),
        Task("causal_lm_token", causal_lm_token, log_odds=True, check=check_causal, **_KEYS),
        Task("seq2seq_lm", seq2seq_lm, **_IDS),
        Task("seq2seq_lm_token", seq2seq_lm_token, log_odds=True, **_KEYS),
        Task("pixel_classification", pixel_classification, **_IDS),
        Task("pixel", pixel, log_odds=True, **_KEYS),
        clip_task(),
    )
}


def get_task(task: str | Task) -> Task:
    """Return a task by its name, or the task itself."""
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    raise ValueError(f"task: expected a trak_ext.tasks.Task or one of {list(TASKS)}, got {task!r}")
