"""Settings that save memory, and how much each of them saves."""

from collections.abc import Callable, Iterator
from functools import partial
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple

from jsonargparse import Namespace

from srpo_lightning.callbacks.ema import EMA
from srpo_lightning.config.arguments import sharded
from srpo_lightning.config.classes import of_class
from srpo_lightning.jobs.estimate.devices import is_sharded, num_devices
from srpo_lightning.jobs.estimate.prediction import predict
from srpo_lightning.jobs.estimate.units import in_gib, verdict
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.training.optimizers import is_eight_bit

POLICY = "model.policy.init_args"
SMALL_PX, CELL_PX = 512, 32


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
