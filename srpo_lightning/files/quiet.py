"""Silence about what libraries say of optional parts of each other when they are imported."""

import logging
import os
import warnings


def quiet() -> None:
    """Call it before they are imported. Their own variables turn everything on again."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", "IProgress not found")
