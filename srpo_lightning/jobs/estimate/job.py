"""`estimate`: whether a configuration fits into a device's memory, and what would make it fit."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from srpo_lightning.callbacks.ema import EMA
from srpo_lightning.config.arguments import choose_strategy, read_config, sharded
from srpo_lightning.config.classes import of_class
from srpo_lightning.jobs.estimate.devices import devices_per_node, is_sharded, num_devices, num_sharing_samples
from srpo_lightning.jobs.estimate.host import INTERPRETER, host_peak, machine_memory
from srpo_lightning.jobs.estimate.memory import GIB, MemoryTracker
from srpo_lightning.jobs.estimate.prediction import predict, quiet
from srpo_lightning.jobs.estimate.published import small_files, write_small_files
from srpo_lightning.jobs.estimate.step import CASTS, LASTING
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.training.optimizers import is_eight_bit


@contextmanager
def local_files(config: Namespace) -> Iterator[list[str]]:
    """Put folders of small files in the place of published models; yields the names of those."""
    with tempfile.TemporaryDirectory() as folder:
        used: list[str] = []

        def visit(value: Any) -> Any:
            if isinstance(value, Namespace):
                value.pop("filename", None)  # of weights, which are not read
                for key, own in vars(value).items():
                    value[key] = visit(own)
            elif isinstance(value, list):
                return [visit(own) for own in value]
            elif isinstance(value, dict):
                return {key: visit(own) for key, own in value.items()}
            elif isinstance(value, str):
                name = "xswu/HPSv2" if Path(value).name.startswith("HPS_v2") and value.endswith(".pt") else value
                if files := small_files(name):
                    used.append(name)
                    return str(write_small_files(name, files, Path(folder)))
            return value

        visit(config.model)
        visit(config.trainer.callbacks)
        yield list(dict.fromkeys(used))


class Option(NamedTuple):
    """A change of the configuration that may save memory.

    Args:
        setting: Setting as a person would write it.
        change: Change of a configuration in place; it returns False where it is there already or does not apply.
        takes_devices: Whether it takes more devices than there are.
    """

    setting: str
    change: Callable[[Namespace], bool]
    takes_devices: bool = False


def turn(key: str, value: Any) -> Option:
    """Give one setting a value."""

    def change(config: Namespace) -> bool:
        if config.get(key, value) == value:
            return False
        config[key] = value
        return True

    return Option(f"{key} {str(value).lower() if isinstance(value, bool) else value}", change)


def smaller_batch(config: Namespace) -> bool:
    """The same number of prompts per optimizer step, one at a time."""
    size, config.data.batch_size = config.data.batch_size, 1
    config.trainer.accumulate_grad_batches *= size
    return size > 1


def smaller_pictures(config: Namespace) -> bool:
    """The same shape, with a longer side of SMALL_PX."""
    policy = config.model.policy.init_args
    longest = max(policy.get("height") or 0, policy.get("width") or 0)
    if longest <= SMALL_PX or not (policy.get("height") and policy.get("width")):
        return False
    for side in ("height", "width"):
        policy[side] = max(CELL_PX, round(policy[side] * SMALL_PX / longest / CELL_PX) * CELL_PX)
    return True


def small_states(config: Namespace) -> bool:
    """AdamW with states of 8 bits."""
    if is_eight_bit(resolve_name(config.model.optimizer.class_path)):
        return False
    config.model.optimizer.class_path = "srpo_lightning.training.low_bit.AdamW8bit"
    return True


def in_backward(config: Namespace) -> bool:
    """No gradients beyond the backward pass; one process, or FSDP2."""
    if config.model.optimizer_in_backward or (num_devices(config.trainer) > 1 and not is_sharded(config.trainer)):
        return False
    config.model.optimizer_in_backward = True
    config.trainer.accumulate_grad_batches, config.trainer.gradient_clip_val = 1, None
    return True


def average_on_host(config: Namespace) -> bool:
    """The ema out of the way."""
    found = [own for own in of_class(config.trainer.callbacks, EMA) if own.init_args.device != "host"]
    for callback in found:
        callback.init_args.device = "host"
    return bool(found)


def shard_over(size: int, config: Namespace) -> bool:
    """FSDP2, on more devices than now."""
    if is_sharded(config.trainer) and config.trainer.strategy.init_args.shard_size >= size:
        return False
    if config.model.policy.init_args.get("quantize", "none") != "none":
        return False
    config.trainer.strategy = sharded(size)
    return True


def offload(config: Namespace) -> bool:
    """FSDP2 with weights in the machine's memory, on as many devices as now."""
    if config.model.policy.init_args.get("quantize", "none") != "none":
        return False
    if not is_sharded(config.trainer):
        config.trainer.strategy = sharded(num_devices(config.trainer))
    init_args = config.trainer.strategy.init_args
    init_args.cpu_offload, had = True, init_args.cpu_offload
    return not had


def adapter(quantize: str, config: Namespace) -> bool:
    """Train adapters of rank 32, beside weights in bfloat16 or 4 bits."""
    policy = config.model.policy.init_args
    if policy.get("adapter", True) or (quantize != "none" and is_sharded(config.trainer)):
        return False
    policy.adapter = Namespace(**vars(Lora()))
    policy.dtype, policy.quantize = "bfloat16", quantize
    return True


POLICY = "model.policy.init_args"
SMALL_PX, CELL_PX = 512, 32
OPTIONS = (
    turn(f"{POLICY}.gradient_checkpointing", True),
    turn(f"{POLICY}.vae_checkpointing", True),
    turn(f"{POLICY}.vae_tiling", True),
    turn(f"{POLICY}.vae_dtype", "bfloat16"),
    turn("model.reward.init_args.dtype", "bfloat16"),
    turn("model.objective.init_args.reward_batch_size", 1),
    Option("data.batch_size 1, with as much more trainer.accumulate_grad_batches", smaller_batch),
    Option("model.optimizer.class_path srpo_lightning.training.low_bit.AdamW8bit", small_states),
    Option("EMA with device: host", average_on_host),
    Option("model.optimizer_in_backward true, without accumulation and trainer.gradient_clip_val", in_backward),
    turn(f"{POLICY}.dtype", "bfloat16"),
    Option("ShardedStrategy with cpu_offload true, on the same devices: weights in the machine's memory", offload),
    Option("ShardedStrategy with shard_size 2, on as many devices", partial(shard_over, 2), takes_devices=True),
    Option("ShardedStrategy with shard_size 8, on as many devices", partial(shard_over, 8), takes_devices=True),
    Option(f"{POLICY}.adapter {{rank: 32}} and dtype bfloat16: LoRA", partial(adapter, "none")),
    Option(f"{POLICY}.adapter {{rank: 32}} and quantize nf4: QLoRA", partial(adapter, "nf4")),
    Option(f"{POLICY}.height and width of {SMALL_PX} at most", smaller_pictures),
)


def use_devices(config: Namespace, devices: int) -> None:
    """Train on so many devices instead."""
    config.trainer.devices, config.trainer.num_nodes = devices, 1
    if is_sharded(config.trainer):
        config.trainer.strategy.init_args.update(Namespace(shard_size=devices, replicate_size=1))


def report(config: Namespace, tracker: MemoryTracker, published: list[str]) -> str:
    """The split at the peak, and the peak of each phase."""
    highest = tracker.peaks[tracker.peak_phase]
    policy, divided = config.model.policy.init_args, num_sharing_samples(config.trainer)
    source = f"{', '.join(published)} as published" if published else "the models' config.json"
    head = (
        f"{config.trainer.precision}, {policy.get('height')} x {policy.get('width')} px, batch_size "
        f"{config.data.batch_size}, devices: {num_devices(config.trainer)}"
        f"{', sharded' if is_sharded(config.trainer) else ''}"
        f"{f', tokens divided by {divided}' if divided > 1 else ''}; architecture: {source}"
    )
    parts = sorted(highest.parts.items(), key=lambda part: (part[0] not in LASTING, -part[1]))
    rows = [
        f"{in_gib(size):>10}  {name if name in (*LASTING, CASTS) else f'made in: {name}'}"
        for name, size in parts
        if size > highest.total / 10_000
    ]
    phases = [f"{in_gib(peak.total):>10}  {phase}" for phase, peak in tracker.peaks.items()]
    return "\n".join(
        [
            f"Predicted memory per device in GiB ({head})",
            "\nPeaks:",
            *phases,
            f"\nThe highest, in: {tracker.peak_phase}",
            *rows,
            f"{in_gib(highest.total):>10}  in all",
        ]
    )


def host_report(tracker: MemoryTracker, ranks: int, memory: int) -> str:
    """What the machine's own memory must hold, beside the devices'."""
    peak = host_peak(tracker, ranks)
    phases = {"reading models": tracker.reading_bytes, "training": tracker.host_bytes}
    rows = [f"{in_gib(size):>10}  {phase}" for phase, size in phases.items()]
    beside = f"each of its {ranks} ranks beside {in_gib(INTERPRETER)} of Python"
    head = f"Predicted memory of the machine in GiB, for {beside}:"
    found = f"{in_gib(peak)} GiB in all: {verdict(peak, memory)} a machine of {in_gib(memory)} GiB"
    return "\n".join(["", head, *rows, found])


def try_options(config: Namespace, peak: int, room: int, target: Literal["cuda", "cpu"]) -> Iterator[str]:
    """What each option saves, most first; then the fewest of them, in that order, that fit together.

    Options that take more devices come last: who has one card is told first what fits it.
    """
    found = []
    for option in OPTIONS:
        changed = config.clone()
        if option.change(changed):
            tracker = predict(changed, target)
            found.append((tracker.peaks[tracker.peak_phase].total, option))
    found = sorted(own for own in found if own[0] < peak)
    found.sort(key=lambda own: own[1].takes_devices)
    for size, option in found:
        yield f"{in_gib(peak - size):>10} {in_gib(size):>10}  {verdict(size, room)}: {option.setting}"
    if not found or any(size <= room for size, option in found if not option.takes_devices):
        return
    together, used = config.clone(), []
    for _, option in found:
        if option.change(together):
            used.append(option.setting)
            tracker = predict(together, target)
            size = tracker.peaks[tracker.peak_phase].total
            if size <= room:
                break
    yield f"\nTogether {in_gib(size)} GiB, {verdict(size, room)}: " + "; ".join(used)


def verdict(size: int, room: int) -> str:
    """Whether so many bytes fit."""
    return "fits" if size <= room else "does not fit"


def in_gib(size: int) -> str:
    """Two decimals, of models below a GiB three more."""
    return f"{size / GIB:.2f}" if size >= GIB or not size else f"{size / GIB:.4f}"


def parse_bytes(text: str) -> int:
    """80GiB, 24GB or 512MiB in bytes.

    Raises:
        ValueError: if it is none of these.
    """
    units = {"GIB": GIB, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6}
    match = re.fullmatch(r"([0-9.]+)\s*([GM]I?B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size of memory: write it as 80GiB, 24GB or 512MiB")
    return int(float(match[1]) * units[match[2].upper()])


def estimate(
    config: list[str],
    devices: PositiveInt | None = None,
    device_memory: str = "80GiB",
    reserve: str = "2GiB",
    target: Literal["cuda", "cpu"] = "cuda",
    options: Literal["if-needed", "always", "never"] = "if-needed",
    host_memory: str | None = None,
) -> None:
    """Predict the memory of training, per device, without a GPU and without weights.

    Args:
        config: Configuration files and settings that `fit` would get; each changes what those before it say.
        devices: Number of devices instead of the configuration's; with ShardedStrategy they share one copy.
        device_memory: Memory of one device, such as 80GiB or 24GB.
        reserve: Share of the memory kept free for the CUDA context, kernels' workspaces and fragmentation.
        target: Kind of device whose rules of autocast and optimizer kernels count.
        options: Whether to try, one by one, what would save memory; each is a prediction of its own.
        host_memory: Memory of the machine, which the ranks on it share, such as 64GiB; null takes this one's.

    Raises:
        ValueError: with the cure, if the configuration cannot be read or asks for a model whose shape is not known.
    """
    memory, kept_free = parse_bytes(device_memory), parse_bytes(reserve)
    machine = machine_memory() if host_memory is None else parse_bytes(host_memory)
    settings = read_config(*config)
    if devices is not None:
        use_devices(settings, devices)
    choose_strategy(settings, devices_per_node(settings.trainer))
    with local_files(settings) as published, quiet():
        tracker = predict(settings, target)
        print(report(settings, tracker, published))
        peak, room = tracker.peaks[tracker.peak_phase].total, memory - kept_free
        print(f"\n{verdict(peak, room)} a device of {in_gib(memory)} GiB with {in_gib(kept_free)} kept free")
        if options == "always" or (options == "if-needed" and peak > room):
            print("\nOne change at a time, GiB saved and left:")
            for line in try_options(settings, peak, room, target):
                print(line, flush=True)
        if target == "cuda":
            ranks = num_devices(settings.trainer) // int(settings.trainer.num_nodes)
            print(host_report(tracker, ranks, machine))
