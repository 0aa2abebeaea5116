"""`python -m srpo_lightning`, and `srpo`, which is the same."""

import os
import sys

from srpo_lightning.files.quiet import quiet_program
from srpo_lightning.training.allocator import keep_freed_memory

quiet_program()
keep_freed_memory()
# Threads that spin long while they wait slow a run down many times as soon as another program uses one of the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from srpo_lightning.cli import main  # noqa: E402


def program() -> None:
    """The console script: as with `python -m`, modules in the working directory are found."""
    sys.path.insert(0, "")
    main()


if __name__ == "__main__":
    main()
