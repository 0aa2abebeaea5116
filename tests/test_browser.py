"""What a user sees in a browser: TensorBoard's pages of a run, and an executed notebook."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbconvert import HTMLExporter
from PIL import Image

from tests.notebooks import NOTEBOOKS, colours, executed, pictures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

DASHBOARD = (330, 70, 1280, 900)  # the corners of TensorBoard's page without its header and its settings
FIRST_RUN_COLOUR = (255, 112, 67)  # of TensorBoard's curves

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")


def visit(url: str, folder: Path, width: int = 1280, height: int = 900) -> tuple[str, Image.Image]:
    """The page's elements after its scripts have run for a while, and what it looks like."""
    picture = folder / "page.png"
    arguments = (
        "--headless",
        "--no-sandbox",  # which refuses to start as root
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
        "--virtual-time-budget=15000",  # milliseconds of the page's clock, which stands still while it loads
        "--dump-dom",
        f"--screenshot={picture}",
    )
    page = subprocess.run([str(CHROMIUM), *arguments, url], capture_output=True, text=True, timeout=120, check=True)
    return page.stdout, Image.open(picture).convert("RGB")


@pytest.fixture(scope="module")
def tensorboard(finished_run: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={finished_run}", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_read(url, server)
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_until_read(url: str, server: subprocess.Popen[bytes], patience_s: float = 60) -> None:
    """Return when the server knows the last tag of the run."""
    for _ in range(int(patience_s / 0.2)):
        assert server.poll() is None, "tensorboard has ended"
        try:
            with urllib.request.urlopen(f"{url}/data/plugin/timeseries/tags") as answer:
                if b"distribution/ema/reward" in answer.read():
                    return
        except urllib.error.URLError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"tensorboard has read nothing in {patience_s} s")


def test_tensorboard_lists_what_a_run_logs(tensorboard, tmp_path):
    page, _ = visit(f"{tensorboard}/?darkMode=false#timeseries", tmp_path)
    assert "<title>TensorBoard</title>" in page
    for group in ("train", "val", "samples", "distribution"):
        assert f">{group}<" in page


def test_tensorboard_draws_the_samples(tensorboard, tmp_path):
    _, picture = visit(f"{tensorboard}/?darkMode=false#images", tmp_path)
    assert len(colours(picture.crop(DASHBOARD))) > 2000


def test_tensorboard_draws_the_curves(tensorboard, tmp_path):
    _, picture = visit(f"{tensorboard}/?darkMode=false#scalars&tagFilter=val", tmp_path)
    assert FIRST_RUN_COLOUR in colours(picture.crop(DASHBOARD))


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
