"""The curves of all rows over compute, and pictures of the same prompts by each row."""

from collections import Counter
from collections.abc import Collection
from importlib.util import find_spec
from math import nan
from pathlib import Path
from statistics import fmean

from PIL import Image

from experiments.objectives.report import Report
from experiments.objectives.results import Results
from srpo_lightning.evaluation.pictures import contact_sheet
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.run_folder import RunFolder

PANELS = {
    "reward": "training reward",
    "judge": "held-out judge",
    "saturation": "saturation",
    "diversity": "diversity",
}

LINES = {"relative reward": ":", "late window": "-.", "SRPO": "-", "": "--"}
"""How a row is drawn, by the first of these that its name has."""


def draw(report: Report, path: Path, hidden: Collection[str] = ()) -> str:
    """Write a picture with the mean curves of all rows but the hidden ones; returns a line that says where it is."""
    if find_spec("matplotlib") is None:
        return "no figure: pip install -e '.[notebooks]' brings matplotlib, then add --report_only true"
    import matplotlib.pyplot as plt  # not every installation has it

    rows = {name: curves for name, curves in report.results.items() if name != "base" and name not in hidden}
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), sharex=True, layout="constrained")
    colours, used = plt.colormaps["tab10"], Counter[str]()
    for name, curves in rows.items():
        line = next(line for words, line in LINES.items() if words in name)
        style = {"color": colours(used[line] % 10), "linestyle": line, "linewidth": 3 if name == "SRPO" else 1.4}
        used[line] += 1
        length = min(len(curve.points) for curve in curves)
        forwards = [curves[0].points[i].forwards / 1000 for i in range(length)]
        for column, axis in zip(PANELS, axes.flat, strict=True):
            means = [fmean(curve.points[i].numbers.get(column, nan) for curve in curves) for i in range(length)]
            axis.plot(forwards, means, marker="o", markersize=3, label=name, **style)
    for title, axis in zip(PANELS.values(), axes.flat, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("thousand forward passes of the policy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with complete_or_absent(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    return f"curves: {path}"


def show(results: Results, path: Path, num_columns: int = 12) -> str:
    """Write a sheet with the last pictures of each row's first run; returns a line that says where it is."""
    rows = {}
    for name, curves in results.items():
        run = curves[0].run
        paths = [RunFolder(run.folder).samples.picture(run.steps, "policy", index) for index in range(num_columns)]
        rows[name] = [Image.open(picture).convert("RGB") for picture in paths if picture.is_file()]
    rows = {name: pictures for name, pictures in rows.items() if pictures}
    if not rows:
        return "no pictures: add SampleLogger to fit.trainer.callbacks"
    with complete_or_absent(path) as partial:
        contact_sheet(rows).save(partial, format="PNG")
    return f"pictures: {path}"
