"""Runs the command line in processes of their own, several at a time, each with its share of the processor's cores."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from experiments.objectives.plan import Run, write_config
from experiments.objectives.results import PEAK, Archive
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.run_folder import RunFolder

PROGRAM = "srpo_lightning.__main__"
PARTS = ("trainer_cli", "policies", "rewards", "objectives", "callbacks")
PRELOADED = [PROGRAM, *(f"srpo_lightning.{part}" for part in PARTS)]  # which a run would import by itself
LOG = "log.txt"
KIB = 1024


def is_done(run: Run) -> bool:
    """Whether the last evaluation of a run is there, and the weights before training are measured."""
    folder = RunFolder(run.folder)
    is_evaluated = not run.steps or any(record["step"] == run.steps for record in folder.read_metrics())
    return is_evaluated and folder.base_table.is_file()


class Runner:
    """Runs what is not done yet.

    Processes are forked from one that has imported everything; each has the whole command line to itself, so that one
    that fails takes no other with it.

    Args:
        num_workers: Number of runs at a time.
        archive: Curves of the runs that are done.
    """

    def __init__(self, num_workers: int, archive: Archive) -> None:
        self.num_workers, self.archive = num_workers, archive
        threads = max(1, (os.cpu_count() or 1) // num_workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.failed: list[Run] = []

    def __call__(self, runs: Iterable[Run]) -> None:
        """Run them in their order, after the evaluations of their bases; those that fail are in `failed`.

        Raises:
            ValueError: if weights before training cannot be evaluated.
        """
        runs = list(runs)
        bases = {run.base.folder: run.base for run in runs if run.base is not None}
        for run in (*bases.values(), *runs):
            if run not in self.archive and is_done(run):  # by an earlier version, or killed before it was kept
                write_config(run)
                self.finish(run)
        waiting = [run for run in runs if run not in self.archive]
        tables = {run.base.folder for run in waiting if run.base is not None}  # which these begin with
        missing = [
            own for own in bases.values() if own not in self.archive or (own.folder in tables and not is_done(own))
        ]
        self.carry_out(list(missing))
        if not all(map(is_done, missing)):
            raise ValueError("the weights before training could not be evaluated: see the log above")
        self.carry_out(waiting)

    def carry_out(self, waiting: list[Run]) -> None:
        """Run them, whether they are done or not."""
        total, busy = len(waiting), dict[ForkServerProcess, Run]()
        with ended_with_this_process(busy):
            while waiting or busy:
                while waiting and len(busy) < self.num_workers:
                    run = waiting.pop(0)
                    print(f"[{total - len(waiting)}/{total}] {run.folder}", flush=True)
                    busy[self.start(run)] = run
                time.sleep(0.2)
                for process in [process for process in busy if not process.is_alive()]:
                    self.finish(busy.pop(process))

    def start(self, run: Run) -> ForkServerProcess:
        """Start a run, or go on with it from its last checkpoint."""
        config = write_config(run)
        arguments = ["fit" if run.steps else "validate", "--config", str(config)]
        if run.base:
            keep_table(RunFolder(run.base.folder).base_table, RunFolder(run.folder).base_table)
        if RunFolder(run.folder).checkpoints():
            arguments += ["--ckpt_path", "last"]
        process = self.context.Process(target=command, args=(arguments, run.folder))
        process.start()
        return process

    def finish(self, run: Run) -> None:
        """Keep numbers, and no weights."""
        if is_done(run):
            self.archive.add(run)
            RunFolder(run.folder).discard_checkpoints()
            return
        self.failed.append(run)
        print(f"{run.folder} failed; the end of {run.folder / LOG}:\n{last_lines(run.folder / LOG)}", flush=True)


@contextmanager
def ended_with_this_process(processes: Collection[ForkServerProcess]) -> Iterator[None]:
    """However this one is ended, they are: runs save what they have, and the next call goes on with them."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        signal.signal(signal.SIGTERM, before)


def command(arguments: list[str], folder: Path) -> None:
    """`python -m srpo_lightning ARGUMENTS` in this process; what it prints and its peak of memory go to `folder`."""
    with (folder / LOG).open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # Open to the end of the process, which says last why it failed.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    sys.argv = ["srpo_lightning", *arguments]
    import_module(PROGRAM).main()
    with complete_or_absent(folder / PEAK) as partial:
        partial.write_text(json.dumps({"bytes": peak_bytes()}), encoding="utf-8")


def peak_bytes() -> int:
    """The peak of the device's memory where there is one, else of the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIB)


def keep_table(source: Path, target: Path) -> None:
    """Copy, complete or absent."""
    with complete_or_absent(target) as partial:
        shutil.copyfile(source, partial)


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ["nothing printed"]
    return "\n".join(f"    {line}" for line in lines[-count:])
