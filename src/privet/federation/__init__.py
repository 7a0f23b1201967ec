"""Federated learning on few bytes: codecs for updates, and which clients take part."""

from privet.federation.base import Codec
from privet.federation.budget import Budget
from privet.federation.dhq import DHQ
from privet.federation.eden import EDEN
from privet.federation.fp16 import FP16
from privet.federation.inspection import inspect
from privet.federation.int8 import Int8
from privet.federation.message import CODECS, decode
from privet.federation.qsgd import QSGD
from privet.federation.quantise import DeadZone, Lloyd, MeanSplit
from privet.federation.sampling import (
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    Sampler,
    Static,
    Step,
    Uniform,
    Weighted,
)
from privet.federation.schema import Schema, Tensor
from privet.federation.sign import ScaledSign
from privet.federation.state import SenderState
from privet.federation.stc import STC
from privet.federation.terngrad import TernGrad
from privet.federation.topk import TopK

__all__ = [
    "CODECS",
    "DHQ",
    "EDEN",
    "FP16",
    "QSGD",
    "STC",
    "Budget",
    "Codec",
    "Cosine",
    "Cyclic",
    "DeadZone",
    "Exponential",
    "Int8",
    "Linear",
    "Lloyd",
    "MeanSplit",
    "Sampler",
    "ScaledSign",
    "Schema",
    "SenderState",
    "Static",
    "Step",
    "Tensor",
    "TernGrad",
    "TopK",
    "Uniform",
    "Weighted",
    "decode",
    "inspect",
]
