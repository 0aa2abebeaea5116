"""Silence about what libraries say of each other and of our use of them, which no user of this package can act on."""

import logging
import os
import re
import sys
import warnings

QUIET = (
    "Found .* in eval mode",  # frozen parts stay in evaluation mode on purpose
    "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning 2.6 on torch 2.13
    "Mismatch dtype between input and weight",  # diffusers' RMSNorm under autocast
    "The '.*_dataloader' does not have many workers",  # features are small files: workers gain nothing
    "Precision bf16-mixed is not supported by the model summary",
    "You're resuming from a checkpoint that ended before the epoch ended",  # the data module goes on where it stood
    "You are using a custom batch sampler",  # it returns every prompt
    "`torch.distributed._functional_collectives.all_gather",  # diffusers 0.42; torch 2.13 has another name for it
    "IProgress not found",  # a notebook without ipywidgets has a bar of letters
)
"""Beginnings of warnings, as regular expressions."""

LOGS = {
    "torchao": r"^Failed to load .*\.so",
    "torchao.kernel.intmm": "Detected no triton",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": "^Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "^Unable to import `torchao` Tensor objects",
    "transformers.utils.import_utils": r"requires torchvision \(not installed\)",  # Pillow is meant
    "lightning.pytorch.utilities.rank_zero": "Tip: .*lit(logger|models)",  # an advertisement at every start
}
"""What is left out of a logger, as a regular expression by the logger's name."""


class LeftOut(logging.Filter):
    """Leaves out the records whose message a regular expression finds something in."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is kept."""
        return re.search(self.name, record.getMessage()) is None


def quiet() -> None:
    """Leave out the messages above, by their words alone; `import srpo_lightning` does it for programs of your own too.

    Of your own settings nothing changes. The filters of warnings come after all that there are, so that yours and
    `python -W` have the first word, and no level of any logger is touched. What a library says while it is imported is
    left out only if this package was imported before it.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message, append=True)
    for name, pattern in LOGS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(own, LeftOut) for own in logger.filters):
            logger.addFilter(LeftOut(pattern))


def quiet_first() -> None:
    """For a program: the warnings above are left out whatever libraries ask for; `python -W` has the first word still.

    Without `python -W` and PYTHONWARNINGS the filters come before all that there are.
    """
    if not sys.warnoptions:
        for message in QUIET:
            warnings.filterwarnings("ignore", message)


def quiet_program() -> None:
    """For the command line alone: only errors of libraries that advise at length. Their own variables turn it on again.

    Call it before they are imported.
    """
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
