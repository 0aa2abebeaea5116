"""Runs the reward models' own published code, each with its own packages in a process of its own.

`<name>.txt` pins the packages (installed without their dependencies into `.originals/<name>` by `make originals`),
`<name>.py` runs them: it reads a dictionary of inputs and writes one of outputs, both by torch.save.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]


def run(name: str, folder: Path, packages: str | None = None, **inputs: Any) -> dict[str, Any]:
    """What the original of `name` makes of the inputs; `folder` is for files in between, `packages` whose it needs."""
    installed = ROOT / ".originals" / (packages or name)
    if not installed.is_dir():
        pytest.skip(f"{installed} is missing: `make originals` installs the original's own packages")
    source, target = folder / "inputs.pt", folder / "outputs.pt"
    torch.save(inputs, source)
    # Run by path, the script would hide the package of the same name.
    script = f"import runpy; runpy.run_path({str(Path(__file__).with_name(f'{name}.py'))!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", script, source, target], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(target, weights_only=True)
