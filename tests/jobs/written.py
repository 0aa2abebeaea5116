"""Prints the peak of this process' memory in KiB before and after writing random weights, and the bytes written."""

import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from srpo_lightning.jobs.stand_in import Component, write_weights


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    folder = Path(sys.argv[-1])
    torch.randn(1024, 1024)
    before = peak()
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(64)))
    write_weights(folder, Component("", "model", model), torch.float32, 0)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(json.dumps([before, peak(), written]))
