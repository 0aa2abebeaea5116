"""Whether a run of N steps and one of N - 1 that is resumed end in the same weights, bit for bit.

The command `fit` itself, on the built-in model, with trainer.deterministic: true, which refuses kernels that add in no
fixed order. All runs that do not wait for another one run side by side.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale
from benchmarks.true_size import tensors
from srpo_lightning.run_folder import RunFolder

RECIPE = "configs/emoji_srpo.yaml"
STEPS = 3

ADAPTER: Mapping[str, Any] = {"adapter": {"rank": 4}, "dtype": "bfloat16"}
PROMPTS = ("red apple", "old clock", "green tree", "small boat", "happy cat", "yellow car")

TRAINED: Mapping[str, Mapping[str, Any]] = {
    "all weights, float32": {},
    "LoRA, bfloat16": ADAPTER,
    "QLoRA, bfloat16": {**ADAPTER, "quantize": "nf4"},
}
"""What is trained, in the policy's settings."""


def settings(policy: Mapping[str, Any], run: Path, device: str) -> dict[str, Any]:
    """What differs from the recipe; its prompts are written beside the run."""
    prompts = run.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return {
        "model": {
            "policy": {"init_args": {**policy, "height": 32, "width": 32, "quantize_dir": None}},
            "objective": {"init_args": {"num_rollout_steps": 2}},
        },
        "data": {
            "train": str(prompts),
            "evaluation": str(prompts),
            "batch_size": 2,
            "cache_dir": str(run.with_suffix(".features")),
        },
        "checkpoint": {"every_n_steps": 1, "monitor": None},
        "default_callbacks": False,
        "trainer": {
            "accelerator": device,
            "devices": 1,
            "deterministic": True,
            "precision": "bf16-mixed" if policy else "32-true",
            "default_root_dir": str(run),
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "logger": False,
            "callbacks": [],
        },
    }


def in_processes(commands: Sequence[Sequence[str]], logs: Sequence[Path]) -> None:
    """Run `python -m srpo_lightning` with each list of arguments, side by side.

    Raises:
        RuntimeError: with the end of what it printed, if one fails.
    """
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w", encoding="utf-8") as stream:
            program = [sys.executable, "-m", "srpo_lightning", *command]
            processes.append(subprocess.Popen(program, stdout=stream, stderr=subprocess.STDOUT, env=environment))
    statuses = [process.wait() for process in processes]
    for status, log in zip(statuses, logs, strict=True):
        if status:
            end = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
            raise RuntimeError(f"fit ended with {status}, see {log}: {end}")


def resume(
    scale: Scale,
    names: Sequence[str] = tuple(TRAINED),
    run: Callable[[Sequence[Sequence[str]], Sequence[Path]], None] = in_processes,
) -> dict[str, Any]:
    """Compare the last checkpoints, for each way of training.

    Args:
        scale: Where; the models are the built-in ones.
        names: What is trained, of TRAINED.
        run: Runs commands side by side, and raises if one fails.
    """
    folder = Path(scale.folder) / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    straight: list[list[str]] = []
    begun: list[list[str]] = []
    resumed: list[list[str]] = []
    for number, name in enumerate(names):
        for kind, commands, steps in (("straight", straight, STEPS), ("parted", begun, STEPS - 1)):
            path = folder / f"{kind}_{number}"
            file = path.with_suffix(".json")
            file.write_text(json.dumps(settings(TRAINED[name], path, scale.device)), encoding="utf-8")
            command = ["fit", "--config", RECIPE, "--config", str(file), "--trainer.max_steps"]
            commands.append([*command, str(steps)])
            if kind == "parted":
                resumed.append([*command, str(STEPS), "--ckpt_path", "last"])
    first = [*straight, *begun]
    run(first, [folder / f"first_{i}.log" for i in range(len(first))])
    run(resumed, [folder / f"resumed_{i}.log" for i in range(len(resumed))])
    rows = {name: compare(folder / f"straight_{i}", folder / f"parted_{i}") for i, name in enumerate(names)}
    return {"runs": rows, "passed": all(row["passed"] for row in rows.values())}


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Weights and optimizer states after the last step, of two runs."""
    paths = [RunFolder(run).checkpoint(STEPS) for run in (one, other)]
    kept = [dict(tensors(torch.load(path, map_location="cpu", weights_only=True))) for path in paths]
    assert kept[0].keys() == kept[1].keys(), f"the checkpoints of {one} and {other} hold other things"
    pairs = [(own, kept[1][name]) for name, own in kept[0].items() if isinstance(own, Tensor)]
    equal = sum(torch.equal(own, other) for own, other in pairs)
    finite = all(bool(own.isfinite().all()) for own, _ in pairs)
    return {"tensors": len(pairs), "equal": equal, "finite": finite, "passed": finite and equal == len(pairs) > 0}
