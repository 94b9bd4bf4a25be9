"""How good attributions are: against retraining on subsets, without proponents, leaving one out.

Each measure has a file; all take tensors, so that scores of any method and retraining of any model
can be judged.
"""

from .brittleness import Brittleness, counterfactual_brittleness
from .datamodeling import LDS, lds
from .difference import LDSDifference, lds_difference
from .leave_one_out import LeaveOneOut, leave_one_out_changes, leave_one_out_correlation
from .mislabel import MislabelAUC, flip_labels, mislabel_auc

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
