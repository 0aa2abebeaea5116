"""A whole run at a published model's size: seconds and memory of each phase, beside what `estimate` predicts.

python -m benchmarks.true_size [--policy black-forest-labs/FLUX.1-dev] [--pixels 256]

QLoRA by configs/flux_srpo_qlora.yaml on a CPU, from stand-ins with random weights (FLUX.1: 26 GB of disk), or from the
models' own folders. Each phase is a command as a user gives it, in a process of its own:
features of two prompts; two steps; the second of them again from the checkpoint of the first, compared bit for bit; one
picture; the adapter's file; and that file read by diffusers alone. Seconds hold each command's start.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torch.utils._pytree import tree_leaves_with_path  # torch has no public name for it

from srpo_lightning.config.arguments import read_config
from srpo_lightning.files.markdown import markdown_table
from srpo_lightning.jobs.estimate.host import INTERPRETER
from srpo_lightning.jobs.estimate.room import predicted_peaks
from srpo_lightning.jobs.estimate.units import GIB
from srpo_lightning.jobs.stand_in import stand_in
from srpo_lightning.run_folder import RunFolder

LOOK_S = 0.05
RECIPE = "configs/flux_srpo_qlora.yaml"
FEW_LAYERS = {"black-forest-labs/FLUX.1-dev": 2}
"""Of text encoders that are larger than what is measured here, and whose features of random weights nobody needs."""

PROMPTS = ("a red apple on a wooden table", "an old man reading beside a window")

READ_ALONE = """
import inspect, json, sys
import diffusers, torch
from accelerate import init_empty_weights
pretrained, lora = sys.argv[1:]
index = diffusers.DiffusionPipeline.load_config(pretrained)
pipeline, cls = getattr(diffusers, index["_class_name"]), getattr(diffusers, index["transformer"][1])
with init_empty_weights():
    transformer = cls.from_config(cls.load_config(pretrained, subfolder="transformer"))
transformer.to(torch.bfloat16).to_empty(device="cpu")  # weights that nobody touches take no memory
state = pipeline.lora_state_dict(lora)
written = sorted(float(tensor.float().abs().sum()) for tensor in state.values())
asked = inspect.signature(pipeline.load_lora_into_transformer).parameters
pipeline.load_lora_into_transformer(
    state, transformer=transformer, **({"network_alphas": None} if "network_alphas" in asked else {})
)
own = [p for name, p in transformer.named_parameters() if ".lora_" in name]
assert written == sorted(float(p.float().abs().sum()) for p in own)
print(json.dumps({"tensors": len(own), "numbers": sum(p.numel() for p in own)}))
"""


class Phase(NamedTuple):
    """What one command took.

    Args:
        name: Name of the phase.
        seconds: Seconds from its start to its end.
        peak_bytes: Most memory that its process had at one moment.
        predicted_bytes: What `estimate` says to that; None where it says nothing.
        own_peak_bytes: Most of it at one look that is not of files, whose pages the system can take back.
    """

    name: str
    seconds: float
    peak_bytes: int
    predicted_bytes: int | None
    own_peak_bytes: int


class Memory(NamedTuple):
    """Of a process, in bytes, from /proc/PID/status (proc_pid_status(5)).

    Args:
        own: What it has now without pages of files, from where weights are read that it keeps: RssAnon + RssShmem.
        peak: Most that it has had since it began its program, pages of files included: VmHWM.
    """

    own: int
    peak: int


def memory_of(process: int) -> Memory:
    """Memory of a process; zeros of one that is gone.

    What `wait4` says would hold the parent's memory too, in which a program begins.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return Memory(0, 0)
    found = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    return Memory(found.get("RssAnon", 0) + found.get("RssShmem", 0), found.get("VmHWM", 0))


def measured(name: str, command: list[str], log: Path, predicted: int | None = None) -> Phase:
    """Run a command, its output in `log`.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT)
        own = peak = 0
        while process.poll() is None:
            now = memory_of(process.pid)
            own, peak = max(own, now.own), max(peak, now.peak)
            time.sleep(LOOK_S)
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}:\n{log.read_text(encoding='utf-8')[-4000:]}")
    return Phase(name, time.perf_counter() - start, peak, predicted, own)


class Size(NamedTuple):
    """How much is computed.

    Args:
        pixels: Height and width of the pictures.
        text_tokens: Tokens per prompt.
        num_rollout_steps: Number of steps of a rollout and of a picture.
        dtype: Numbers that are computed in; bfloat16 is slow on processors without it.
    """

    pixels: int
    text_tokens: int
    num_rollout_steps: int
    dtype: str


def settings(policy: str, reward: str, output: Path, size: Size) -> dict[str, Any]:
    """What differs from the recipe: two prompts, few steps, no judge."""
    (output / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return {
        "model": {
            "policy": {
                "init_args": {
                    "pretrained": policy,
                    "height": size.pixels,
                    "width": size.pixels,
                    "dtype": size.dtype,
                    "vae_dtype": size.dtype,
                    "quantize_dir": str(output / "nf4"),
                }
            },
            "reward": {"init_args": {"pretrained": reward, "dtype": size.dtype}},
            "objective": {"init_args": {"num_rollout_steps": size.num_rollout_steps}},
            "num_sample_steps": size.num_rollout_steps,
        },
        "data": {
            "train": str(output / "prompts.txt"),
            "evaluation": str(output / "prompts.txt"),
            "num_eval_prompts": 1,
            "cache_dir": str(output / "features"),
            "max_sequence_length": size.text_tokens,
            "text_dtype": size.dtype,
            "text_batch_size": 1,
            "text_device": "cpu",
        },
        "checkpoint": {"every_n_steps": 1, "monitor": None},
        "default_callbacks": False,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(output / "run"),
            "precision": "bf16-mixed" if size.dtype == "bfloat16" else "32-true",
            "max_steps": 2,
            "accumulate_grad_batches": 1,
            "num_sanity_val_steps": 0,
            "val_check_interval": 1000,
            "logger": False,
            "callbacks": [],
        },
    }


def phases(policy: str, reward: str, output: Path, more: list[str], size: Size) -> list[Phase]:
    """All of them in their order."""
    own = output / "true_size.yaml"
    own.write_text(yaml.safe_dump(settings(policy, reward, output, size)), encoding="utf-8")
    configs = [RECIPE, *more, str(own)]
    files = [part for config in configs for part in ("--config", config)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        device, host = pool.submit(predicted_peaks, read_config(*configs), "cpu", 1).result()
    predicted = max(device + INTERPRETER, host)
    program = ["-m", "srpo_lightning"]
    run, again = RunFolder(output / "run"), RunFolder(output / "again")
    done = [measured("cache", [*program, "cache", *files], output / "cache.log")]
    report(done)
    done.append(measured("fit, two steps", [*program, "fit", *files], output / "fit.log", predicted))
    report(done)
    (again.path / "checkpoints").mkdir(parents=True)
    shutil.copy(run.checkpoint(1), again.checkpoint(1))
    resumed = [*program, "fit", *files, "--trainer.default_root_dir", str(again.path), "--ckpt_path", "last"]
    done.append(measured("resume, one step", resumed, output / "resume.log", predicted))
    report(done)
    assert_equal(run.checkpoint(2), again.checkpoint(2))
    config = ["--config", str(run.path / "config.yaml")]
    drawn = [*program, "predict", *config, "--ckpt_path", "last"]
    done.append(measured("predict, one picture", drawn, output / "predict.log"))
    report(done)
    lora = output / "lora"
    exported = [*program, "export", *config, "--format", "lora", "--weights", "policy", "--check", "false"]
    done.append(measured("export", [*exported, "--output", str(lora)], output / "export.log"))
    done.append(measured("diffusers alone", ["-c", READ_ALONE, policy, str(lora)], output / "diffusers.log"))
    report(done)
    found = json.loads((output / "diffusers.log").read_text(encoding="utf-8").splitlines()[-1])
    print(f"diffusers read {found['tensors']} tensors of the adapter, {found['numbers']:,} numbers")
    return done


def assert_equal(one: Path, other: Path) -> None:
    """Two checkpoints' weights and optimizer states, bit for bit.

    Raises:
        AssertionError: naming what differs first.
    """
    contents = (torch.load(path, map_location="cpu", weights_only=True) for path in (one, other))
    flat = [dict(tensors(content)) for content in contents]
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[0].items():
        same = torch.equal(value, flat[1][name]) if isinstance(value, torch.Tensor) else value == flat[1][name]
        assert same, f"{name} of {other} is not that of {one}"


def tensors(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is trained of a checkpoint, by its place."""
    kept = [content["state_dict"], content["optimizer_states"]]
    for path, leaf in tree_leaves_with_path(kept):
        yield str(path), leaf


def report(done: list[Phase]) -> None:
    """The table so far."""
    rows = [
        [
            phase.name,
            f"{phase.seconds:.0f}",
            f"{phase.peak_bytes / GIB:.1f}",
            "" if phase.predicted_bytes is None else f"{phase.predicted_bytes / GIB:.1f}",
            f"{phase.own_peak_bytes / GIB:.1f}",
        ]
        for phase in done
    ]
    header = ["phase", "seconds", "peak GiB", "predicted GiB", "without pages of files GiB"]
    print(markdown_table(header, rows), flush=True)


def folder_of(model: str, parent: Path) -> str:
    """A model's folder; of a published name its stand-in's, which is written where it is not there."""
    if Path(model).is_dir():
        return model
    folder = parent / model.replace("/", "--")
    if not folder.is_dir():
        stand_in(model, str(folder), FEW_LAYERS.get(model))
    return str(folder)


def true_size(
    *,
    policy: str = "black-forest-labs/FLUX.1-dev",
    reward: str = "xswu/HPSv2",
    output: str = "runs/true_size",
    more: list[str] | None = None,
    pixels: PositiveInt = 256,
    text_tokens: PositiveInt = 512,
    num_rollout_steps: PositiveInt = 3,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Print the table.

    Args:
        policy: Folder of a pipeline, or a published name, of which a stand-in is written in runs/stand_ins.
        reward: Folder that HPSv2 takes, or a published name likewise.
        output: Folder to work in, which is emptied first.
        more: Configuration files beside the recipe, such as configs/families/z_image.yaml.
        pixels: Height and width of the pictures.
        text_tokens: Number of tokens per prompt.
        num_rollout_steps: Number of steps of a rollout and of a picture.
        dtype: Numbers that are computed in; bfloat16 is slow on processors without it.
    """
    folder = Path(output)
    stand_ins = folder.parent / "stand_ins"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = folder_of(policy, stand_ins), folder_of(reward, stand_ins)
    size = Size(int(pixels), int(text_tokens), int(num_rollout_steps), dtype)
    done = phases(*models, folder, more or [], size)
    (folder / "phases.json").write_text(json.dumps([phase._asdict() for phase in done], indent=2), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(true_size)
