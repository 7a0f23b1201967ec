"""The version, where everything can reach it."""

VERSION = "0.1.0"
