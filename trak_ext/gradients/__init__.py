"""Per-sample gradients of a task's output for the chosen parameters, in bounded memory."""

from .computer import GradientComputer, SampleGradients
from .parameters import ParameterChoice, choose_parameters

__all__ = ["GradientComputer", "ParameterChoice", "SampleGradients", "choose_parameters"]
