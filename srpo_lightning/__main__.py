import logging
import os

# Libraries warn, whenever they are imported, of optional parts of each other. Their own variables turn that on again.
for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
    os.environ.setdefault(name, "error")

from srpo_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
