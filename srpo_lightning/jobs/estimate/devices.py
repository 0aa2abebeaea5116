"""How many devices a configuration has, and whether they share one copy of the weights."""

from jsonargparse import Namespace

from srpo_lightning.config.classes import is_class
from srpo_lightning.training.strategies import ShardedStrategy


def is_sharded(trainer: Namespace) -> bool:
    """Whether the strategy is FSDP2."""
    return isinstance(trainer.strategy, Namespace) and is_class(trainer.strategy.class_path, ShardedStrategy)


def num_devices(trainer: Namespace) -> int:
    """How many there are in all."""
    if is_sharded(trainer):
        return int(trainer.strategy.init_args.shard_size * trainer.strategy.init_args.replicate_size)
    return max(int(trainer.num_nodes) * devices_per_node(trainer), num_sharing_samples(trainer))


def num_sharing_samples(trainer: Namespace) -> int:
    """How many of them share each sample, and divide its tokens."""
    strategy = trainer.strategy
    return int(strategy.init_args.get("context_parallel", 1)) if isinstance(strategy, Namespace) else 1


def devices_per_node(trainer: Namespace) -> int:
    """How many there are on each; `auto`, which depends on the machine, counts as one."""
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    return int(devices) if str(devices).isdecimal() else 1
