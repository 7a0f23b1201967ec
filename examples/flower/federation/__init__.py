"""The app that `flwr run` starts."""
