"""Protections, one a file, and their names."""

from privet.learning import Job, Publication
from privet.protection.ar import AR
from privet.protection.base import Bounded, Protection
from privet.protection.cuda import CUDA
from privet.protection.em import EM
from privet.protection.keyed_em import KeyedEM
from privet.protection.lock import Lock
from privet.protection.lsp import LSP
from privet.protection.ops import OPS
from privet.protection.pil import PIL
from privet.protection.publication import publish
from privet.protection.random_noise import RandomNoise
from privet.protection.rem import REM
from privet.protection.sem import SEM
from privet.protection.tap import TAP
from privet.protection.tue import TUE
from privet.protection.ucl import UCL
from privet.protection.uge import UGE

__all__ = [
    "AR",
    "CUDA",
    "EM",
    "LSP",
    "METHODS",
    "OPS",
    "PIL",
    "REM",
    "SEM",
    "TAP",
    "TUE",
    "UCL",
    "UGE",
    "Bounded",
    "Job",
    "KeyedEM",
    "Lock",
    "Protection",
    "Publication",
    "RandomNoise",
    "publish",
]

METHODS: dict[str, type[Protection]] = {
    method.name: method
    for method in (EM, SEM, REM, TAP, PIL, UCL, TUE, LSP, AR, OPS, CUDA, KeyedEM, Lock, UGE, RandomNoise)
}
