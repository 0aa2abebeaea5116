"""SRPO for flow-matching text-to-image models, on PyTorch Lightning. Importing this imports no torch."""

from srpo_lightning.files.quiet import quiet

__version__ = "0.2.0"

quiet()
