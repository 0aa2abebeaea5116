"""Notebooks run as a user runs them, from notebooks/ of the repository, with their parameters as environment variables."""

import base64
import io
import os
import shutil
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(notebook: Path, folder: Path, environment: dict[str, str]) -> nbformat.NotebookNode:
    """Run a copy of the notebook under `folder`; a cell that fails raises."""
    copies = shutil.copytree(notebook.parent, folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    node = nbformat.read(copies / notebook.name, as_version=4)
    client = NotebookClient(node, timeout=300, resources={"metadata": {"path": str(copies)}})
    with mock.patch.dict(os.environ, environment | {"PYTHONPATH": str(ROOT)}):
        return client.execute()


def pictures(cell: nbformat.NotebookNode) -> list[Image.Image]:
    """The pictures that a cell has put out."""
    data = [output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in data]


def num_colours(picture: Image.Image) -> int:
    """How many distinct colours a picture has; a blank one has 1."""
    colours = picture.getcolors(picture.width * picture.height)
    assert colours is not None
    return len(colours)
