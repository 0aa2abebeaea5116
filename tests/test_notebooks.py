"""Every notebook runs from its first cell to its last, and its pictures show something."""

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, colours, executed, pictures

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
