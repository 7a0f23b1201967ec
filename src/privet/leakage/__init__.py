"""Inversions, one a file: private images and labels from what a client sent."""

from __future__ import annotations

from privet.leakage.analytic import Analytic
from privet.leakage.base import Inversion, Reconstruction
from privet.leakage.dlg import DLG
from privet.leakage.embedder import Embedder
from privet.leakage.grnn import GRNN
from privet.leakage.identify import Gallery, identify
from privet.leakage.ig import IG

__all__ = [
    "DLG",
    "GRNN",
    "IG",
    "INVERSIONS",
    "Analytic",
    "Embedder",
    "Gallery",
    "Inversion",
    "Reconstruction",
    "identify",
]

INVERSIONS: dict[str, type[Inversion]] = {
    inversion.name: inversion for inversion in (GRNN, DLG, IG, Analytic)
}
