"""Notebooks run as a user runs them, in their own folder, with the parameters in environment variables."""

import base64
import io
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@cache
def executed(notebook: Path, run: Path) -> nbformat.NotebookNode:
    """The notebook after all its cells; one that fails raises. It reads, and may write to, a copy of the run folder."""
    with tempfile.TemporaryDirectory() as folder:
        copies = shutil.copytree(notebook.parent, Path(folder, "notebooks"), ignore=shutil.ignore_patterns(".*"))
        environment = {
            "PYTHONPATH": str(ROOT),
            "RUN": str(shutil.copytree(run, Path(folder, "run"))),
            "NUM_STEPS": "2",
            "NUM_PROMPTS": "2",
        }
        node = nbformat.read(copies / notebook.name, as_version=4)
        client = NotebookClient(node, timeout=1200, resources={"metadata": {"path": str(copies)}})
        with mock.patch.dict(os.environ, environment):
            return client.execute()


def pictures(cell: nbformat.NotebookNode) -> list[Image.Image]:
    """The pictures that a cell has put out."""
    data = [output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in data]


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    """The distinct colours of a picture; a blank one has one."""
    counted = picture.getcolors(picture.width * picture.height)
    assert counted is not None
    return {colour for _, colour in counted}
