import logging
import os

# Libraries warn, whenever they are imported, of optional parts of each other. Their own variables turn that on again.
for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
    os.environ.setdefault(name, "error")
# Threads that spin while they wait slow a run down many times as soon as another program uses one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from srpo_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
