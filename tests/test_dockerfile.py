"""The Dockerfile is linted; whether it builds is not tried, since no test may need a daemon."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_hadolint_has_nothing_to_say():
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, REPOSITORY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_it_installs_extras_that_there_are_by_a_python_that_is_tested():
    text = (REPOSITORY / "Dockerfile").read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"srpo_lightning\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    assert re.search(r'^ENTRYPOINT \["srpo"\]$', text, re.MULTILINE)
    assert "srpo" in project["scripts"]
