"""Every notebook runs from its first cell to its last, and its pictures show something, in a browser too."""

import json
import shutil

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbconvert import HTMLExporter

from srpo_lightning.run_folder import RunFolder
from tests.browser import needs_browser, visit
from tests.notebooks import NOTEBOOKS, ROOT, colours, executed, pictures

DRAWS = ("plt.subplots(", "contact_sheet(rows")
FEW_COLOURS = 50  # black letters and axes with smooth edges have fewer


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_that_draws_puts_out_a_picture(notebook, finished_run):
    cells = [cell for cell in executed(notebook, finished_run).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    drawing = [cell for cell in cells if any(call in cell.source for call in DRAWS)]
    assert drawing
    for cell in drawing:
        assert [len(colours(picture)) > FEW_COLOURS for picture in pictures(cell)] == [True], cell.source


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(notebook):
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "clear all outputs, then save"


@needs_browser
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_headings_and_pictures(notebook, finished_run, tmp_path):
    """At a width at which no picture is scaled, every colour of every picture is on the page."""
    node = executed(notebook, finished_run)
    html, _ = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="").from_notebook_node(node)
    (tmp_path / "notebook.html").write_text(html, encoding="utf-8")
    page, screenshot = visit(f"file://{tmp_path}/notebook.html", tmp_path, width=1600, height=9000)
    shown = colours(screenshot)
    for cell in node.cells:
        if cell.cell_type == "code":
            assert all(colours(picture) <= shown for picture in pictures(cell))
        elif cell.source.startswith("#"):
            heading = cell.source.splitlines()[0].lstrip("# ")
            assert f">{heading}<" in page


def test_a_run_that_drew_nothing_before_training_is_shown_from_its_first_pictures(finished_run, tmp_path, monkeypatch):
    run = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    kept = [line for line in run.metrics.read_text().splitlines() if json.loads(line)["step"]]
    run.metrics.write_text("\n".join(kept) + "\n")
    shutil.rmtree(run.samples.picture(0, "policy", 0).parents[1])
    run.base_table.unlink()
    monkeypatch.setenv("RUN", str(run.path))
    notebook = nbformat.read(ROOT / "notebooks" / "inspect_samples.ipynb", as_version=4)
    names: dict[str, object] = {}
    with plt.ioff():
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)  # as the kernel does, which takes seconds to start
    assert names["first"] == min(json.loads(line)["step"] for line in kept)
    plt.close("all")
