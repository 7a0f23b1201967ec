"""privet decides who can learn from your images."""

__version__ = "0.1.0"
