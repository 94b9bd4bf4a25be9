"""What TRAK is compared with: simpler attributions under the same interface as `Attributor`."""

from .base import Baseline, Random
from .gradient import GradientBaseline, GradientCosine, GradientProduct, TracIn
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
