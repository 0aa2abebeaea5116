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


def script(path: Path, *lines: str) -> Path:
    """A program."""
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    path.chmod(0o755)
    return path


def test_the_reward_models_packages_wait_for_the_environment_also_with_several_jobs(checkout):
    """An environment that takes a moment to be there, and whose pip only makes the folder it is to fill."""
    (checkout / ".venv" / "installed").unlink()
    (checkout / "tests" / "parity" / "originals").mkdir(parents=True)
    (checkout / "tests" / "parity" / "originals" / "one.txt").touch()
    pip = script(checkout / "pip", 'while [ "$1" ]; do [ "$1" = --target ] && mkdir -p "$2"; shift; done; true')
    python = script(checkout / "python", "sleep 0.5", f"mkdir .venv/bin && cp {pip} .venv/bin")
    subprocess.run(["make", "--jobs", "4", "originals", f"PYTHON={python}"], cwd=checkout, check=True)
    assert (checkout / ".originals" / "one" / "installed").is_file()


@TARGETS
def test_the_first_demo_moves_nothing(target, name, checkout):
    assert "earlier" not in made(target, name, checkout)
