"""What `estimate` predicts against what a training step takes, over the settings that change it.

python -m benchmarks.memory compare [--start configs/emoji_srpo.yaml]
python -m benchmarks.memory table [--sides [512,720,1024]]

On a CPU the peak of torch's allocator, as tests/jobs/measured.py explains; on a GPU, where there is one,
torch.cuda.max_memory_allocated too.
"""

from collections.abc import Mapping

import torch
from jsonargparse import Namespace, auto_cli

from srpo_lightning.callbacks.ema import EMA
from srpo_lightning.config.arguments import read_config
from srpo_lightning.config.classes import of_class
from srpo_lightning.jobs.estimate.job import use_devices
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.jobs.estimate.prediction import predict, quiet
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.jobs.estimate.units import GIB, in_gib
from srpo_lightning.policies.adapters import Lora
from tests.jobs.measured import measured_peak

SGD = Namespace(class_path="torch.optim.SGD", init_args=Namespace(lr=1e-3))

EIGHT_BIT = {
    "model.optimizer": Namespace(class_path="srpo_lightning.training.low_bit.AdamW8bit", init_args=Namespace(lr=5e-6))
}
ADAPTER = Namespace(**vars(Lora()))
NF4 = {f"{POLICY}.quantize": "nf4"}

MIXED = {"trainer.precision": "bf16-mixed"}
FULL = {"trainer.precision": "32-true"}
CASES: dict[str, dict[str, object]] = {
    "bf16-mixed": MIXED,
    "bf16-mixed, batch 4 x 4 accumulated": MIXED | {"data.batch_size": 4, "trainer.accumulate_grad_batches": 4},
    "bf16-mixed, both checkpointings": MIXED
    | {f"{POLICY}.gradient_checkpointing": True, f"{POLICY}.vae_checkpointing": True},
    "bf16-mixed, reward_batch_size 1": MIXED | {"model.objective.init_args.reward_batch_size": 1},
    "bf16-mixed, bfloat16 weights, batch 2": MIXED | {f"{POLICY}.dtype": "bfloat16", "data.batch_size": 2},
    "32-true": FULL,
    "32-true, gradient checkpointing": FULL | {f"{POLICY}.gradient_checkpointing": True},
    "32-true, batch 4, no EMA": FULL | {"data.batch_size": 4, "trainer.callbacks": None},
    "32-true, batch 2, SGD": FULL | {"data.batch_size": 2, "model.optimizer": SGD},
    "32-true, 128 px, reward_batch_size 8": FULL
    | {"model.objective.init_args.reward_batch_size": 8, f"{POLICY}.height": 128, f"{POLICY}.width": 128},
    "32-true, optimizer_in_backward, batch 2, reward_batch_size 1": FULL
    | {
        "data.batch_size": 2,
        "model.optimizer_in_backward": True,
        "trainer.gradient_clip_val": None,
        "model.objective.init_args.reward_batch_size": 1,
    },
    "32-true, LoRA rank 8, batch 4": FULL
    | {"data.batch_size": 4, f"{POLICY}.adapter": Namespace(**vars(Lora(rank=8)))},
}


RECIPES: dict[str, dict[str, object]] = {
    "full, float32 weights": {},
    "full, bfloat16 weights": {f"{POLICY}.dtype": "bfloat16"},
    "full, bfloat16 weights, 8-bit states": {f"{POLICY}.dtype": "bfloat16", **EIGHT_BIT},
    "the same, stepped in the backward pass, no EMA": {
        f"{POLICY}.dtype": "bfloat16",
        **EIGHT_BIT,
        "model.optimizer_in_backward": True,
        "trainer.accumulate_grad_batches": 1,
        "trainer.gradient_clip_val": None,
        "trainer.callbacks": None,
    },
    "LoRA rank 32, bfloat16 base": {f"{POLICY}.dtype": "bfloat16", f"{POLICY}.adapter": ADAPTER},
    "QLoRA rank 32, NF4 base": {
        f"{POLICY}.dtype": "bfloat16",
        f"{POLICY}.adapter": ADAPTER,
        f"{POLICY}.quantize": "nf4",
    },
}


def table(sides: tuple[int, ...] = (512, 720, 1024), start: str = "configs/flux_srpo.yaml") -> None:
    """Predict recipes for FLUX.1-dev on 1 and on 8 devices, sharded where that is possible; without judges.

    Args:
        sides: of the pictures, in pixels.
        start: the configuration that all recipes start from.
    """
    for side in sides:
        for name, changes in RECIPES.items():
            row = []
            for devices in (1, 8):
                settings = changed(start, changes | {f"{POLICY}.height": side, f"{POLICY}.width": side})
                use_devices(settings, devices)
                if devices == 1 or f"{POLICY}.quantize" in changes:
                    settings.trainer.strategy = "auto"
                with local_files(settings), quiet():
                    prediction = predict(settings)
                row.append(prediction.peaks[prediction.peak_phase].total / GIB)
            print(f"| {name} | {side} | {row[0]:.1f} | {row[1]:.1f} |", flush=True)


def changed(start: str, changes: Mapping[str, object], *more: str) -> Namespace:
    """A configuration, and `more` files on top of it, with other settings; of its callbacks the average alone."""
    settings = read_config(start, *more)
    settings.trainer.callbacks = of_class(settings.trainer.callbacks, EMA)
    for key, value in changes.items():
        settings[key] = value
    return settings


def compare(start: str = "configs/emoji_srpo.yaml") -> None:
    """Print the table.

    Args:
        start: the configuration that all cases start from; its models must be here.
    """
    kinds = {"cpu": "CPU"} | ({"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
    print(f"{'GiB':62}{'device':>10}{'predicted':>11}{'measured':>11}{'ratio':>8}")
    for name, changes in CASES.items():
        settings = changed(start, changes)
        for target in kinds:
            with quiet():
                prediction = predict(settings, target)
            predicted, measured = prediction.peaks[prediction.peak_phase].total, measured_peak(settings, target)
            ratio = predicted / measured
            print(f"{name:62}{target:>10}{in_gib(predicted):>11}{in_gib(measured):>11}{ratio:>8.3f}", flush=True)
    if "cuda" not in kinds:
        print("There is no CUDA GPU here: predictions for one were not compared with measurements.")


if __name__ == "__main__":
    auto_cli([compare, table], as_positional=False)
