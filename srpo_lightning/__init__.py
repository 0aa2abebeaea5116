"""SRPO for flow-matching text-to-image models, on PyTorch Lightning. Importing this imports no torch."""

__version__ = "0.2.0"
