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
from tools.notebooks import COLOURS, SUM, execute, source_sum

DRAWS = ("plt.subplots(", "contact_sheet(rows")
LARGEST_BYTES = 1_000_000
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
def test_notebooks_are_kept_with_small_outputs_of_their_own_source(notebook):
    kept = nbformat.read(notebook, as_version=4)
    assert kept.metadata.get(SUM) == source_sum(kept), "the source is another than the outputs are of: make notebooks"
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type in ("display_data", "execute_result", "stream") for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert all(pictures(cell) for cell in cells if any(call in cell.source for call in DRAWS))
    content = notebook.read_text(encoding="utf-8")
    assert len(content) < LARGEST_BYTES
    assert str(ROOT) not in content


def test_a_changed_source_is_noticed_and_a_changed_output_is_not():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    before = source_sum(notebook)
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text="2")]
    assert source_sum(notebook) == before
    notebook.cells[0].source = "1 + 2"
    assert source_sum(notebook) != before


def test_a_notebook_is_run_with_its_parameters_and_written_with_a_small_picture(tmp_path, monkeypatch):
    path = tmp_path / "mine.ipynb"
    source = (
        "import os\nfrom PIL import Image\nprint(os.environ['WORD'])\nImage.effect_noise((64, 64), 90).convert('RGB')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"mine": 1})])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    execute(path, {"WORD": "hello"})
    written = nbformat.read(path, as_version=4)
    (cell,) = written.cells
    assert (cell.metadata, cell.execution_count, cell.outputs[0].text) == ({}, 1, "hello\n")
    assert written.metadata[SUM] == source_sum(written)
    assert len(colours(pictures(cell)[0])) <= COLOURS


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
