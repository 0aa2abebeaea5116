"""`python -m experiments.objectives --config experiments/objectives/emoji.yaml`."""

import sys
from pathlib import Path

from srpo_lightning.files.quiet import quiet_program

quiet_program()

from experiments.objectives.job import benchmark  # noqa: E402
from srpo_lightning.cli import as_program, run_job  # noqa: E402
from srpo_lightning.errors import OWN  # noqa: E402

OWN.add(Path(__file__).parent)


def main(args: list[str] | None = None) -> None:
    """Compare objectives; what is refused ends in one line.

    Args:
        args: Words of the command line; None reads them from the process.
    """
    with as_program():
        run_job(benchmark, "experiments.objectives", sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
