"""The command line in processes of their own, one per rank, as torchrun starts them.

They are forked from a server that has imported everything: imports take longer than the runs. That the program also
starts from nothing, and starts its ranks itself, tests/cli/test_emoji_run.py and tests/ranks/test_two_ranks.py show.
"""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from srpo_lightning.cli import JOBS

PRELOADED = ["srpo_lightning.trainer_cli", *JOBS.values(), "tests.tiny"]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
LIMIT_S = 1200.0
"""For what hangs, on whatever machine: no test is about how long anything takes."""

PATIENCE_S = 60.0  # with the other ranks, once one has failed


class Done(NamedTuple):
    """How a program ended.

    Args:
        returncode: of the first rank that did not end with 0; minus a signal's number.
        output: what all ranks have printed.
    """

    returncode: int
    output: str


def start(
    arguments: Sequence[str],
    num_ranks: int = 1,
    before: Callable[[], None] | None = None,
    timeout_s: float = LIMIT_S,
    program: str = "srpo_lightning.cli",
) -> Done:
    """Run `python -m srpo_lightning ARGUMENTS` on so many ranks, and wait.

    Args:
        before: called in each process first; a function of a module.
        program: the module whose `main` is run.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(num_ranks)]
        together = torchrun(num_ranks)
        ranks = [
            launch(arguments, log, together | {"RANK": str(i), "LOCAL_RANK": str(i)}, before, program)
            for i, log in enumerate(logs)
        ]
        returncode, deadline = 0, time.monotonic() + timeout_s
        while any(rank.is_alive() for rank in ranks):
            if not returncode and (returncode := first_failure(ranks)):
                deadline = min(deadline, time.monotonic() + PATIENCE_S)
            if time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
            ranks[0].join(0.02)
            time.sleep(0.02)
        return Done(returncode or first_failure(ranks), "\n".join(log.read_text() for log in logs))


def launch(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    program: str = "srpo_lightning.cli",
) -> ForkServerProcess:
    """One process of the command line, running; what it prints is added to `log`."""
    process = CONTEXT.Process(target=_run, args=(list(arguments), log, dict(environment or {}), before, program))
    process.start()
    return process


def torchrun(num_ranks: int) -> dict[str, str]:
    """What torchrun tells all ranks of one node; nothing to one process."""
    if num_ranks == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(num_ranks)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }


def first_failure(ranks: Sequence[ForkServerProcess]) -> int:
    """The status of the first rank that has ended otherwise than with 0."""
    return next((rank.exitcode for rank in ranks if rank.exitcode), 0)


def _run(
    arguments: list[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None, program: str
) -> None:
    stream = log.open("a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    os.environ.update(environment)
    sys.argv = ["srpo_lightning", *arguments]
    if before is not None:
        before()
    import_module(program).main()
