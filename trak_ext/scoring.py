"""The name of `trak_ext.estimator.scoring` in 0.1.0, kept for those who import it."""

from .estimator.scoring import TopK, kernel_matrix, score, top_k

__all__ = ["TopK", "kernel_matrix", "score", "top_k"]
