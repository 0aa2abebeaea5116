"""What the machine is, and which versions of what ran on it."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from srpo_lightning.files.provenance import software

PACKAGES = (
    "diffusers",
    "transformers",
    "lightning",
    "peft",
    "bitsandbytes",
    "torchao",
    "triton",
    "xformers",
    "flash-attn",
)


def machine(device: str) -> dict[str, Any]:
    """The machine by name and number, for the page and the numbers."""
    return {
        **(gpu() if device == "cuda" else {"device": "CPU"}),
        "processor cores": os.cpu_count() or 0,
        "memory of the machine": int(psutil.virtual_memory().total),
        "system": platform.platform(),
        "versions": versions(),
    }


def gpu() -> Mapping[str, Any]:
    """The first one."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory of the device": int(properties.total_memory),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": int(properties.multi_processor_count),
        "driver": driver(),
    }


def driver() -> str:
    """Its version, by nvidia-smi; `unknown` where that is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Of this project and of what it computes with; what is not installed is left out."""
    found = {"srpo_lightning": software().removeprefix("srpo_lightning "), "python": platform.python_version()}
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
