"""What `make` does beside calling the program."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


TARGETS = pytest.mark.parametrize(("target", "name"), [("demo", "emoji_demo"), ("demo-video", "moving_demo")])


@pytest.fixture
def checkout(tmp_path) -> Path:
    """With an environment that is set up."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / "runs").mkdir()
    return tmp_path


def made(target: str, name: str, checkout: Path) -> str:
    """`make` of a demo, whose training leaves a run of its own."""
    trains = f"sh -c 'mkdir runs/{name} && echo again > runs/{name}/report.html'"
    done = subprocess.run(["make", target, f"RUN={trains}"], cwd=checkout, capture_output=True, text=True, check=True)
    assert f"configs/{name}.yaml" in done.stdout
    return done.stdout


@TARGETS
def test_a_demo_moves_an_earlier_run_aside_and_says_where_it_is(target, name, checkout):
    (run := checkout / "runs" / name).mkdir()
    (run / "report.html").write_text("first")
    assert f"the earlier run is runs/{name}_1 now" in made(target, name, checkout)
    assert f"the earlier run is runs/{name}_2 now" in made(target, name, checkout)
    found = {run.name: (run / "report.html").read_text().strip() for run in (checkout / "runs").iterdir()}
    assert found == {f"{name}_1": "first", f"{name}_2": "again", name: "again"}


@TARGETS
def test_the_first_demo_moves_nothing(target, name, checkout):
    assert "earlier" not in made(target, name, checkout)
