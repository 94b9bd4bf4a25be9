"""Attributions as people look at them: one HTML file, and a folder to make it from later."""

from .attributions import Attributions, Item, LDSSummary
from .bundle import BundleError, load_bundle, save_bundle
from .page import render, write_report

__all__ = [
    "Attributions",
    "BundleError",
    "Item",
    "LDSSummary",
    "load_bundle",
    "render",
    "save_bundle",
    "write_report",
]
