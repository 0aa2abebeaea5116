"""`report`: the page of a run, again, from what its folder holds."""

from pathlib import Path

from srpo_lightning.report.run_page import RunPage
from srpo_lightning.run_folder import RunFolder


def report(runs: list[str]) -> None:
    """Write report.html into run folders, as the callback Report does while they train.

    Args:
        runs: Folders of runs; `validation` in one, which `validate` wrote, is one too.

    Raises:
        ValueError: if a folder holds no evaluations.
    """
    folders = [RunFolder(Path(run).expanduser()) for run in runs]
    for folder in folders:
        folder.check_evaluated()
    for folder in folders:
        page = RunPage(folder)
        print(page.write())
        for note in page.notes:
            print(f"  left out: {note}")
