"""ClientApp and ServerApp, as privet has them."""

from privet.federation.flower.app import client, server

__all__ = ["client", "server"]
