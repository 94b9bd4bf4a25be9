"""How good attributions are: against retraining on subsets, without proponents, leaving one out.

All measures take tensors, so that scores of any method and retraining of any model can be judged.
"""

from .datamodeling import LDS, LDSDifference, lds, lds_difference
from .mislabel import MislabelAUC, flip_labels, mislabel_auc
from .retraining import (
    Brittleness,
    LeaveOneOut,
    counterfactual_brittleness,
    leave_one_out_changes,
    leave_one_out_correlation,
)

__all__ = [
    "LDS",
    "Brittleness",
    "LDSDifference",
    "LeaveOneOut",
    "MislabelAUC",
    "counterfactual_brittleness",
    "flip_labels",
    "lds",
    "lds_difference",
    "leave_one_out_changes",
    "leave_one_out_correlation",
    "mislabel_auc",
]
