"""`estimate`: whether a configuration fits into a device's memory, and what would make it fit."""

from typing import Literal

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from srpo_lightning.config.arguments import choose_strategy, read_config
from srpo_lightning.jobs.estimate.devices import devices_per_node, is_sharded, num_devices, num_sharing_samples
from srpo_lightning.jobs.estimate.host import INTERPRETER, host_peak, machine_memory
from srpo_lightning.jobs.estimate.memory import MemoryTracker
from srpo_lightning.jobs.estimate.options import try_options
from srpo_lightning.jobs.estimate.prediction import predict, quiet
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.jobs.estimate.step import CASTS, LASTING
from srpo_lightning.jobs.estimate.units import in_gib, parse_bytes, verdict


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
