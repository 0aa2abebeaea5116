"""The memory of a training step, from its configuration alone.

The module's own rollout, loss and optimizer run on fake tensors, which have shapes and no numbers, while every live
byte is counted (memory.py), in the order of calls in which Lightning makes them (step.py). Models are built from their
config.json; no weights are read, but those of rewards that do without `from_pretrained`. Sharded, FSDP2 itself runs on
fake tensors, in a process group that pretends to have so many ranks, and so does what divides tokens. Optimizers and
layers of compiled libraries have stand-ins.

Not counted: what compiled blocks and attention kernels other than torch's own keep; kernels' workspaces, the
allocator's fragmentation, the CUDA context and NCCL's buffers; features of an evaluation's texts; text encoders, which
are freed before training. Of the machine's own memory host.py has what is counted.
"""

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from typing import Any, Literal
from unittest.mock import patch

import torch
from diffusers import ModelMixin
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.precision import MixedPrecision

# Torch has no public names for tensors without memory and for ranks that are none.
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.callbacks import EMA
from srpo_lightning.callbacks.tracking import RewardTracking
from srpo_lightning.config.arguments import new_module
from srpo_lightning.config.classes import of_class
from srpo_lightning.encoding import Encoding
from srpo_lightning.files import pretrained as reading
from srpo_lightning.files.pretrained import load_whole
from srpo_lightning.jobs.estimate.devices import is_sharded, num_devices, num_sharing_samples
from srpo_lightning.jobs.estimate.host import reading_bytes
from srpo_lightning.jobs.estimate.memory import MemoryTracker, cuda_operations
from srpo_lightning.jobs.estimate.stand_ins import EightBitStates, keep_in_4_bits
from srpo_lightning.jobs.estimate.step import CASTS, FROZEN, TRAINED, evaluate, train
from srpo_lightning.phases import ROLLOUT
from srpo_lightning.policies import adapters, flow_policy, loading
from srpo_lightning.policies.base import Policy, Shard
from srpo_lightning.rewards.base import Reward
from srpo_lightning.training import nf4
from srpo_lightning.training.context import Context, new_context
from srpo_lightning.training.optimizers import is_eight_bit
from srpo_lightning.training.strategies import ShardedStrategy


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build models in it at once: in float32 first those of twelve billion weights would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def without_weights(device: str = "meta") -> Iterator[None]:
    """Every `from_pretrained` of diffusers and transformers builds the model of the configuration, at random.

    On the meta device layers in 4 bits have a stand-in; elsewhere they are made of the random weights.
    """
    nothing_missing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    def of_diffusers(cls: Any, /, pretrained: str, *, subfolder: str, torch_dtype: torch.dtype, **own: Any) -> Any:
        with torch.device(device), default_dtype(torch_dtype):
            model = loading.cast(cls.from_config(cls.load_config(pretrained, subfolder=subfolder)), torch_dtype).eval()
        return (model, nothing_missing) if own.get("output_loading_info") else model

    def of_transformers(cls: Any, /, pretrained: str, *, dtype: torch.dtype, **own: Any) -> Any:
        with torch.device(device), default_dtype(dtype):
            model = cls(cls.config_class.from_pretrained(pretrained)).to(dtype).eval()
        return (model, nothing_missing) if own.get("output_loading_info") else model

    def in_4_bits(policy: loading.Loaded) -> Any:
        model: Any = load_whole(policy.diffusers_class, *policy.start_place, torch_dtype=policy.dtype)
        for _, block in loading.blocks(model):
            (keep_in_4_bits if device == "meta" else nf4.keep_in_4_bits)(block, double=policy.quantize == "nf4-double")
        return model

    with (
        patch.object(ModelMixin, "from_pretrained", classmethod(of_diffusers)),
        patch.object(flow_policy, "safetensors_files", lambda *_: {}),
        patch.object(loading, "safetensors_files", lambda *_: {}),
        patch.object(reading, "safetensors_files", lambda *_: {}),
        patch.object(loading, "read_in_4_bits", in_4_bits),
        patch.object(loading, "stream_into", lambda *_: None),
        patch.object(adapters, "stream_into", lambda *_: None),
        patch.object(PreTrainedModel, "from_pretrained", classmethod(of_transformers)),
    ):
        yield


def judges_of(trainer: Namespace) -> list[Reward]:
    """The reward models of RewardTracking, which are on the device while it evaluates."""
    parser = LightningArgumentParser()
    parser.add_argument("--judges", type=list[Reward])
    chosen = [own.init_args for own in of_class(trainer.callbacks, RewardTracking)]
    judges = [judge for own in chosen for judge in (own.judge, *(own.get("metrics") or {}).values()) if judge]
    return list(parser.instantiate_classes(Namespace(judges=judges)).judges)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' advice on models that are built and not read."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "torch.distributed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def predict(config: Namespace, target: Literal["cuda", "cpu"] = "cuda") -> MemoryTracker:
    """Run a configuration's training step on fake tensors.

    Raises:
        ValueError: with a cure, if a model cannot be built, or shapes in it depend on numbers.
    """
    config = config.clone()
    if is_eight_bit(resolve_name(config.model.optimizer.class_path)):
        config.model.optimizer = Namespace(
            class_path=f"{EightBitStates.__module__}.EightBitStates", init_args=Namespace()
        )
    eager(config)
    module = new_module(config)
    ema = next((EMA(**vars(own.init_args)) for own in of_class(config.trainer.callbacks, EMA)), None)
    if hasattr(module.objective, "num_rollout_steps"):
        module.objective.num_rollout_steps = 1  # no more at a time, however many there are
    tracker = MemoryTracker(ROLLOUT, dict.fromkeys((TRAINED, FROZEN), CASTS))
    with ExitStack() as stack:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        strategy = stack.enter_context(sharded(config.trainer)) if is_sharded(config.trainer) else None
        context = strategy.context if strategy else stack.enter_context(sharing_samples(config.trainer))
        judges = judges_of(config.trainer)
        with without_weights():
            for judge in judges:
                judge.load()
            module.policy.load(None if strategy is None else in_mode(mode, strategy.shard))
            if context is not None:
                module.policy.divide(context)
            module.reward.load()
            tracker.reading_bytes = reading_bytes(module)
        stack.enter_context(mode)
        if target == "cuda":
            stack.enter_context(cuda_operations())
        make_fake(module)
        for judge in judges:
            make_fake(judge)
        try:
            conditions = fake_conditions(config, module.policy, config.data.batch_size)
            lasting = train(module, conditions, config.trainer, ema, tracker, on_cuda=target == "cuda")
            if judges:
                conditions = fake_conditions(config, module.policy, config.data.eval_batch_size)
                evaluate(module, judges, conditions, config.trainer.precision, tracker)
            del lasting
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ValueError(
                f"{type(module.reward).__name__} decides by numbers, which are not there ({error}): estimate with "
                "HPSv2 in its place, and add the difference of their weights"
            ) from error
    return tracker


def eager(config: Namespace) -> None:
    """Turn off what needs tensors with numbers in them: compiled blocks and kernels other than torch's own."""
    policy = config.model.policy.init_args
    for setting, value in (("compile", False), ("attention", None)):
        if setting in policy:
            policy[setting] = value


@contextmanager
def sharded(trainer: Namespace) -> Iterator[ShardedStrategy]:
    """The configured strategy, on the first of so many ranks, of which there are no others."""
    strategy = ShardedStrategy(**vars(trainer.strategy.init_args))
    size = strategy.shard_size * strategy.replicate_size
    strategy.parallel_devices = [torch.device("cpu")] * size
    if trainer.precision == "bf16-mixed":
        strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    with fake_ranks(size):
        strategy.make_mesh("cpu")
        yield strategy


@contextmanager
def sharing_samples(trainer: Namespace) -> Iterator[Context | None]:
    """The first of the ranks that share samples, each with all weights; None where each has samples of its own."""
    degree = num_sharing_samples(trainer)
    if degree == 1:
        yield None
        return
    size = num_devices(trainer)
    with fake_ranks(size):
        yield new_context(degree, size, "cpu")


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """The first of so many ranks, of which there are no others."""
    init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        destroy_process_group()


def in_mode(mode: FakeTensorMode, shard: Shard) -> Shard:
    """Give sharded parameters fake memory."""

    def fake(model: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> None:
        with mode:
            shard(model, blocks)

    return fake


def make_fake(module: torch.nn.Module) -> None:
    """Put fake tensors, as the active mode makes them, in the place of a model's; sharded ones were made in it."""
    loading.give_memory(module, lambda tensor: not isinstance(tensor, DTensor))


def fake_conditions(config: Namespace, policy: Policy, size: int) -> Conditions:
    """A batch of the shapes that the data module would hand out; of several sizes of pictures the largest."""
    sizes = [(height, width) for width, height in config.data.get("sizes") or []]
    wanted = Encoding(config.data.max_sequence_length, getattr(torch, config.data.text_dtype))
    shapes = policy.text_shapes(wanted)

    def text(rows: int) -> Text:
        return Text({name: torch.zeros(rows, *shape, dtype=wanted.dtype) for name, shape in shapes.items()})

    return Conditions(
        [f"prompt {i}" for i in range(size)],
        text(size),
        torch.zeros(size, dtype=torch.int64),
        max(sizes, key=math.prod, default=None),
        unconditional=text(1) if policy.has_negative else None,
    )
