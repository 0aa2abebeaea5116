"""What `make` does beside calling the program."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """With an environment that is set up, and the run of an earlier demo."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    (run := tmp_path / "runs" / "emoji_demo").mkdir(parents=True)
    (run / "report.html").write_text("first")
    return tmp_path


def demo(checkout: Path) -> str:
    """`make demo`, whose training leaves a run of its own."""
    trains = "sh -c 'mkdir runs/emoji_demo && echo again > runs/emoji_demo/report.html'"
    done = subprocess.run(["make", "demo", f"RUN={trains}"], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_demo_moves_an_earlier_run_aside_and_says_where_it_is(checkout):
    assert "the earlier run is runs/emoji_demo_1 now" in demo(checkout)
    assert "the earlier run is runs/emoji_demo_2 now" in demo(checkout)
    found = {run.name: (run / "report.html").read_text().strip() for run in (checkout / "runs").iterdir()}
    assert found == {"emoji_demo_1": "first", "emoji_demo_2": "again", "emoji_demo": "again"}


def test_the_first_demo_moves_nothing(checkout):
    shutil.rmtree(checkout / "runs")
    (checkout / "runs").mkdir()
    assert "earlier" not in demo(checkout)
