"""What TRAK is compared with: simpler attributions under the same interface as `Attributor`."""

from .base import Baseline
from .gradient import GradientBaseline, GradientCosine, GradientProduct, TracIn
from .random_scores import Random
from .representation import RepresentationSimilarity

__all__ = [
    "Baseline",
    "GradientBaseline",
    "GradientCosine",
    "GradientProduct",
    "Random",
    "RepresentationSimilarity",
    "TracIn",
]
