"""Federated learning on few bytes: codecs for updates, and which clients take part."""
