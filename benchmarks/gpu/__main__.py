"""Whether this machine's GPU computes what it should, and what a training step takes of it: within 25 minutes.

python -m benchmarks.gpu [--parts [correctness,speed]] [--limit_minutes 25] [--output gpu.json]

Nothing is downloaded: models are stand-ins with random weights in the geometries of published ones. Every part runs in
a process of its own with a limit of its own; benchmarks/gpu/parts.py lists them in order of worth, and what no longer
fits is named. Numbers go to the output as JSON, tables to a page of Markdown beside it, after every part anew.

Exit status: 0, nothing has failed; 1, something has; 2, there is no CUDA GPU.
"""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat

from benchmarks.gpu.isolated import run_alone
from benchmarks.gpu.page import page, verdict
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import FAILED, run_parts
from benchmarks.gpu.scale import Scale
from srpo_lightning.files.strict_json import strict_json


def main(
    *,
    parts: list[str] | None = None,
    limit_minutes: PositiveFloat = 25.0,
    output: str = "gpu.json",
    folder: str = "runs/gpu",
    device: Literal["cuda", "cpu"] = "cuda",
    size: Literal["full", "small"] = "full",
) -> int:
    """Measure, print the tables and write them.

    Args:
        parts: Names of what is measured; null is everything.
        limit_minutes: Minutes that all parts have together.
        output: File for all numbers, as JSON; the page has the same name with the suffix .md.
        folder: Folder for stand-ins (32 GB in all), logs and what runs write; kept, for the next time.
        device: Kind of the device. On a CPU the same code runs for trying it, and its numbers mean nothing.
        size: Geometry of the models: of published ones, or of the built-in one.

    Returns:
        The exit status.

    Raises:
        ValueError: listing the parts, if one is unknown.
    """
    unknown = [name for name in parts or [] if name not in PARTS]
    if unknown:
        raise ValueError(f"parts has {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    if device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA GPU here: nothing was measured.")
        return 2
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {}
    names = [name for name in PARTS if parts is None or name in parts]
    scale = Scale(device, size, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    of_device = run_alone("benchmarks.gpu.machine:machine", 120, Path(folder) / "machine.log", device=device)
    results: dict[str, Any] = {"machine": of_device, "size": size, "parts": done}
    for name, found in run_parts(names, scale, limit_minutes * 60):
        done[name] = found
        results["verdict"] = verdict(done)
        path.write_text(strict_json(results, indent=1), encoding="utf-8")
        path.with_suffix(".md").write_text(page(results), encoding="utf-8")
        print(f"{name}: {found['state']}, {found['seconds']:.0f} s", flush=True)
    print(f"\n{page(results)}\n{path} and {path.with_suffix('.md')} have all numbers.")
    return int(any(found["state"] == FAILED for found in done.values()))


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
