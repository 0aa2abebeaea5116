"""`compare`: several runs on one page."""

from pathlib import Path

from srpo_lightning.report.comparison_page import write_comparison_page


def compare(runs: list[str], output: str = "comparison.html") -> None:
    """Write a page with several runs: curves, last values with differences, the same prompts, settings that differ.

    Args:
        runs: Folders of two or more runs; differences are from the first.
        output: File to write.

    Raises:
        ValueError: if there are fewer than two runs, or one holds no evaluations.
    """
    if len(runs) < 2:
        raise ValueError(f"compare has {len(runs)} run: name two or more, or take `report` for one")
    path = Path(output).expanduser()
    if path.is_dir():
        raise ValueError(f"output is {output}, a folder: name a .html file")
    write_comparison_page(path, [Path(run).expanduser() for run in runs])
    print(path)
