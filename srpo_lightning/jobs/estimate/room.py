"""Whether the devices have room for a run, asked before it reads any weights."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from srpo_lightning.callbacks.tracking import RewardTracking
from srpo_lightning.config.classes import is_class
from srpo_lightning.jobs.estimate.host import host_peak, machine_memory
from srpo_lightning.jobs.estimate.options import OPTIONS
from srpo_lightning.jobs.estimate.prediction import predict, quiet
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.jobs.estimate.units import GIB

CERTAIN = 0.9
"""A device must have this share of the predicted peak: against a CPU's allocator predictions are right to 6 %."""

SMALL = 0.01
"""Models whose files take a smaller share of the device's memory are let pass."""


def check_room(config: Namespace, trainer: Trainer) -> None:
    """Predict the peak of large models, in a process of its own, and refuse it where it cannot fit.

    A prediction that fails lets the run pass: a model of one's own may do what tensors without memory cannot.

    Args:
        config: Configuration of `fit`, with its strategy chosen.
        trainer: Trainer built of it, whose devices are looked at.

    Raises:
        ValueError: naming `estimate` and the settings that save memory.
    """
    devices = getattr(trainer.strategy, "parallel_devices", None) or [trainer.strategy.root_device]
    kind = devices[0].type
    memory = memory_per_rank(devices)
    if memory is None or is_small(config, memory):
        return
    settings = Namespace(model=config.model, data=config.data, trainer=config.trainer).clone()
    settings.trainer.devices = len(devices)
    target: Literal["cuda", "cpu"] = "cuda" if kind == "cuda" else "cpu"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        prediction = pool.submit(predicted_peaks, settings, target, len(devices))
        if prediction.exception() is not None:  # perhaps of a judge of one's own
            prediction = pool.submit(predicted_peaks, without_judges(settings), target, len(devices))
    failure = prediction.exception()
    if failure is not None:
        rank_zero_warn(f"the memory of this run could not be predicted ({type(failure).__name__}: {failure})")
        return
    peak, host = prediction.result()
    if kind == "cuda":
        check_host(host, machine_memory())
    found = (
        f"predicted peak {peak / GIB:.1f} GiB of memory, where {memory / GIB:.1f} GiB are there for each {kind} rank"
    )
    cure = f"`python -m srpo_lightning estimate --config ... --device_memory {memory / GIB:.0f}GiB` says what would fit"
    if peak * CERTAIN > memory:
        options = "; ".join(option.setting for option in OPTIONS if option.change(settings.clone()))
        raise ValueError(f"{found}: {cure}, of these: {options}. With memory_check false it is tried all the same")
    if peak > memory * CERTAIN:
        rank_zero_warn(f"{found}, which is close: {cure}")
    else:
        rank_zero_info(found)


def without_judges(settings: Namespace) -> Namespace:
    """The same without the judges and metrics of evaluations."""
    own = settings.clone()
    own.trainer.callbacks = [o for o in own.trainer.callbacks or [] if not is_class(o.class_path, RewardTracking)]
    return own


def check_host(peak: int, memory: int) -> None:
    """Refuse what the memory of the machine cannot hold.

    Raises:
        ValueError: naming the settings that save it.
    """
    if peak * CERTAIN > memory:
        raise ValueError(
            f"predicted {peak / GIB:.1f} GiB of the machine's own memory, where {memory / GIB:.1f} GiB are there: less "
            "is needed by fewer ranks, ShardedStrategy without cpu_offload, model.policy.init_args.dtype bfloat16 or "
            "quantize nf4, or EMA with device: same. With memory_check false it is tried all the same"
        )


def memory_per_rank(devices: list[torch.device]) -> int | None:
    """Bytes that each rank of this node can have at most; None where that is not known."""
    if devices[0].type == "cuda":
        return min(int(torch.cuda.get_device_properties(device).total_memory) for device in devices)
    return machine_memory() // len(devices) if devices[0].type == "cpu" else None


def is_small(config: Namespace, memory: int) -> bool:
    """Whether the trained model is too small to be predicted, by its files if they are here."""
    pretrained = config.get("model.policy.init_args.pretrained")
    if pretrained is None:
        return True  # nothing that could be predicted
    folder = Path(pretrained).expanduser()
    return folder.is_dir() and sum(f.stat().st_size for f in folder.rglob("*.safetensors")) < SMALL * memory


def predicted_peaks(config: Namespace, target: Literal["cuda", "cpu"], ranks: int) -> tuple[int, int]:
    """Bytes per device, and bytes of the machine for so many ranks on it."""
    with local_files(config), quiet():
        tracker = predict(config, target)
    return tracker.peaks[tracker.peak_phase].total, host_peak(tracker, ranks)
