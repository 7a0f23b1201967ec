"""Federated learning on Flower: two lines for an app that exists, and an app of our own."""

from __future__ import annotations

from privet.errors import MissingExtraError

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise MissingExtraError("Federated learning on Flower", "federation") from error

from privet.federation.flower.grids import LocalGrid
from privet.federation.flower.mod import CodecMod
from privet.federation.flower.strategy import CodecStrategy

__all__ = ["CodecMod", "CodecStrategy", "LocalGrid"]
