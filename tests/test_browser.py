"""What a user sees in a browser of a run: TensorBoard's pages."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import needs_browser, visit
from tests.notebooks import colours

DASHBOARD = (330, 70, 1280, 900)  # the corners of TensorBoard's page without its header and its settings
FIRST_RUN_COLOUR = (255, 112, 67)  # of TensorBoard's curves

pytestmark = needs_browser


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
