"""Runs the notebooks and keeps what they put out, small: `python -m tools.notebooks`, or `make notebooks`.

Each notebook says by a sum which source its outputs are of; tests/test_notebooks.py compares it.
"""

import base64
import hashlib
import io
import os
from pathlib import Path
from unittest import mock

import nbformat
from jsonargparse import auto_cli
from nbclient import NotebookClient
from PIL import Image

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
RUN = Path("runs/notebook")
SHORT = (
    *("--trainer.max_steps", "6", "--trainer.val_check_interval", "3", "--checkpoint.every_n_steps", "6"),
    *("--data.num_eval_prompts", "16", "--data.eval_samples_per_prompt", "2", "--trainer.enable_progress_bar", "false"),
)
"""What a run for `inspect_samples` differs in from the demo."""

COLOURS = 128
SUM = "source_sha256"
"""The key of a notebook's metadata that holds the sum of the source that its outputs are of."""


def source_sum(notebook: nbformat.NotebookNode) -> str:
    """The sum of the sources of a notebook's code cells, as hexadecimal digits."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def train_short(run: Path) -> None:
    """The demo's run, a short one, for the notebook that looks at a run; what is there already is kept."""
    if not RunFolder(ROOT / run).checkpoints():
        demo = str(ROOT / "configs" / "emoji_demo.yaml")
        main(["fit", "--config", demo, *SHORT, "--trainer.default_root_dir", str(ROOT / run)])


def execute(path: Path, environment: dict[str, str]) -> None:
    """Run all cells of a notebook in its own folder, and write their outputs into it.

    Args:
        path: Notebook, .ipynb.
        environment: Variables that the notebook reads its parameters from.
    """
    notebook = nbformat.read(path, as_version=4)
    kept = {name: dict(notebook.metadata[name]) for name in ("kernelspec",)}
    client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(path.parent)}})
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | environment):
        client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        for output in cell.get("outputs", ()):
            shrink(output.get("data", {}))
    notebook.metadata.clear()
    notebook.metadata |= kept | {"language_info": {"name": "python"}, SUM: source_sum(notebook)}
    nbformat.write(notebook, path)


def shrink(data: nbformat.NotebookNode) -> None:
    """Give a picture of an output few colours, chosen for it, where that makes its file smaller."""
    if "image/png" in data:
        content = base64.b64decode(data["image/png"])
        with Image.open(io.BytesIO(content)) as picture:
            small = io.BytesIO()
            picture.convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
        if len(small.getvalue()) < len(content):
            data["image/png"] = base64.b64encode(small.getvalue()).decode("ascii")


def execute_all(names: list[str] | None = None, run: Path = RUN) -> None:
    """Run notebooks and keep their outputs in them.

    Args:
        names: Names of notebooks without their ending; null takes all.
        run: Folder of the run that `inspect_samples` shows, from the top of the repository; it is trained if not there.
    """
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names is None or path.stem in names:
            is_of_run = path.stem == "inspect_samples"
            if is_of_run:
                train_short(run)
            execute(path, {"RUN": os.path.join("..", run)} if is_of_run else {})  # noqa: PTH118  # `..` has to stay


if __name__ == "__main__":
    auto_cli(execute_all)
