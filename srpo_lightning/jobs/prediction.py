"""The memory of a training step, from its configuration alone.

The module's own rollout, loss and optimizer run on fake tensors, which have shapes and no numbers, while every live
byte is counted (memory.py), in the order of calls in which Lightning makes them. Models are built from their
config.json; no weights are read, but those of rewards that do without `from_pretrained`. Sharded, FSDP2 itself runs on
fake tensors, in a process group that pretends to have so many ranks. Optimizers and layers of compiled libraries have
stand-ins.

Not counted: what compiled blocks and attention kernels other than torch's own keep; kernels' workspaces, the
allocator's fragmentation, the CUDA context and NCCL's buffers; features of an evaluation's texts; text encoders, which
are freed before training; and host memory.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Literal, Protocol, runtime_checkable
from unittest.mock import patch

import torch
from diffusers import ModelMixin
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from srpo_lightning import pretrained as reading
from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import EMA
from srpo_lightning.draws import Draws
from srpo_lightning.jobs.stand_ins import EightBitStates, keep_in_4_bits
from srpo_lightning.memory import MemoryTracker, cuda_operations
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies import adapters, flux
from srpo_lightning.policies.base import Shard
from srpo_lightning.pretrained import read_json
from srpo_lightning.rewards.base import Reward
from srpo_lightning.strategies import ShardedStrategy

TRAINED, FROZEN, JUDGES = "trained weights", "frozen weights", "judges of evaluation"
GRADIENTS, STATES, AVERAGE = "gradients", "optimizer states", "EMA"
BATCH, BUCKETS, CASTS = "text features", "gradient buckets of DDP", "weights cast by autocast"
EVALUATION, ROLLOUT, FORWARD, BACKWARD = "evaluation", "rollout", "transformer forward", "transformer backward"
DECODE, REWARD, STEP, AVERAGING = "VAE decode", "reward", "optimizer step", "EMA update"
LASTING = (TRAINED, FROZEN, GRADIENTS, STATES, AVERAGE, BATCH, BUCKETS, JUDGES)


@runtime_checkable  # beartype asks, where shapes are checked
class Phased(Protocol):
    """What wants to know which phase of a step it is."""

    phase: str


def train(
    module: SRPOModule,
    conditions: Conditions,
    trainer: Namespace,
    ema: EMA | None,
    tracker: MemoryTracker,
    *,
    on_cuda: bool,
) -> list[Any]:
    """An optimizer step as Lightning makes it, in the state that the one before has left.

    Args:
        module: with its models loaded.
        conditions: a batch.
        trainer: precision, accumulate_grad_batches and gradient_clip_val count.
        ema: the callback, if there is one.
        tracker: labels what it counts by phase.
        on_cuda: whether CUDA is what the fake tensors stand for.

    Returns:
        What holds on to memory between steps, beside the module and the average.
    """
    parameters = [p for _, p in module.trainable_parameters()]
    offloads = is_sharded(trainer) and trainer.strategy.init_args.cpu_offload
    trained_label, gradient_label, state_label = [""] * 3 if offloads else [TRAINED, GRADIENTS, STATES]
    tracker.label(parameters, trained_label)
    tracker.label((t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad), FROZEN)
    tracker.label([t for t in conditions if isinstance(t, Tensor)], BATCH)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.label([p.grad], gradient_label))
    progress: Any = SimpleNamespace(global_step=0)
    with tracker, phases(module, tracker):
        if ema:
            ema.on_fit_start(progress, module)
            tracker.label(ema.average.values(), AVERAGE if ema.device == "same" and not offloads else "")
        has_buckets = num_devices(trainer) > 1 and not is_sharded(trainer)
        buckets = [torch.zeros_like(parameter) for parameter in parameters if has_buckets]
        tracker.label(buckets, BUCKETS)
        # After a first step there are optimizer states, and gradients until the next backward pass frees them.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = new_optimizer(module, parameters, on_cuda=on_cuda)
        step(optimizer, None, parameters, tracker, state_label)
        tracker.label((p.grad for p in parameters if p.grad is not None), gradient_label)
        if module.optimizer_in_backward:
            module.zero_grad()
        tracker.peaks.clear()
        loss = micro_batch(module, conditions, trainer.precision, tracker)
        if trainer.accumulate_grad_batches == 1:
            module.zero_grad()  # before the backward pass and no sooner: so does Lightning
        tracker.phase = BACKWARD
        loss.backward()
        del loss
        step(optimizer, trainer.gradient_clip_val, parameters, tracker, state_label)
        if ema:
            tracker.phase = AVERAGING
            progress.global_step = ema.every_n_steps
            ema.on_train_batch_end(progress, module, None, conditions, 0)
    return [optimizer, buckets]


def evaluate(
    module: SRPOModule, judges: list[Reward], conditions: Conditions, precision: str, tracker: MemoryTracker
) -> None:
    """What an evaluation has on the device at once: the judges, and a sampling step, the pictures or their scores."""
    module.zero_grad()  # so does Lightning
    for judge in judges:
        tracker.label((*judge.parameters(), *judge.buffers()), JUDGES)
    tracker.phase = EVALUATION
    with tracker, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            latents = module.objective.rollout(module.policy, conditions, Draws(module.seed)).x0
            images = module.policy.decode(latents[: conditions.batch_size])  # a group has more
        for judge in judges:
            judge(images.float(), conditions.prompts)


def new_optimizer(module: SRPOModule, parameters: list[torch.nn.Parameter], *, on_cuda: bool) -> Optimizer:
    """The module's, with the kernels that it would choose.

    Of parameters that are divided it steps this rank's parts as ordinary tensors. They take the same memory, without
    what takes DTensor a minute for twelve billion: working out how the results of each operation are divided.
    """
    if module.optimizer_in_backward:
        configured = module.configure_optimizers()
        optimizer: Optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    else:
        optimizer = module.optimizer([torch.nn.Parameter(local_part(p)) for p in parameters])
    for group in optimizer.param_groups if on_cuda else ():
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, without a copy."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def step(
    optimizer: Optimizer,
    clip_norm: float | None,
    parameters: list[torch.nn.Parameter],
    tracker: MemoryTracker,
    label: str,
) -> None:
    """Change the weights; what the optimizer keeps is told apart from what it needs meanwhile."""
    tracker.phase = STEP
    parts = [part for group in optimizer.param_groups for part in group["params"]]
    if parts[0] is parameters[0]:  # in the backward pass
        optimizer.step()
    else:
        for part, parameter in zip(parts, parameters, strict=True):
            part.grad = None if parameter.grad is None else local_part(parameter.grad)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(parts, clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    tracker.label((t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)), label)


def micro_batch(module: SRPOModule, conditions: Conditions, precision: str, tracker: Phased) -> Tensor:
    """The rollout and the loss, whose graph is all that is left of them."""
    draws = Draws(module.seed, module.micro_step)
    tracker.phase = ROLLOUT
    with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        rollout = module.objective.rollout(module.policy, conditions, draws)
        tracker.phase = FORWARD
        return module.objective.loss(module.policy, module.reward, conditions, rollout, draws).loss


@contextmanager
def phases(module: SRPOModule, tracker: Phased) -> Iterator[None]:
    """Tell the tracker when images are decoded and scored, and when their gradients are."""
    decode, score = module.policy.decode, module.reward.contrast

    def tracked_decode(*args: Any) -> Tensor:
        tracker.phase = DECODE
        images = decode(*args)
        if images.requires_grad:
            images.register_hook(lambda _: setattr(tracker, "phase", DECODE))
        return images

    def tracked_score(*args: Any) -> Tensor:
        tracker.phase = REWARD
        return score(*args)

    with (
        patch.dict(vars(module.policy), {"decode": tracked_decode}),
        patch.dict(vars(module.reward), {"contrast": tracked_score}),
    ):
        yield


@contextmanager
def without_weights(device: str = "meta") -> Iterator[None]:
    """Every `from_pretrained` of diffusers and transformers builds the model of the configuration, at random.

    On the meta device layers in 4 bits have a stand-in; elsewhere they are made of the random weights.
    """
    nothing_missing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    def of_diffusers(cls: Any, /, pretrained: str, *, subfolder: str, torch_dtype: torch.dtype, **own: Any) -> Any:
        with torch.device(device), default_dtype(torch_dtype):
            model = cls.from_config(cls.load_config(pretrained, subfolder=subfolder)).to(torch_dtype).eval()
        return (model, nothing_missing) if own.get("output_loading_info") else model

    def of_transformers(cls: Any, /, pretrained: str, *, dtype: torch.dtype, **own: Any) -> Any:
        with torch.device(device), default_dtype(dtype):
            model = cls(cls.config_class.from_pretrained(pretrained)).to(dtype).eval()
        return (model, nothing_missing) if own.get("output_loading_info") else model

    with (
        patch.object(ModelMixin, "from_pretrained", classmethod(of_diffusers)),
        patch.object(flux, "safetensors_files", lambda *_: {}),
        patch.object(reading, "safetensors_files", lambda *_: {}),
        patch.object(flux, "keep_in_4_bits", keep_in_4_bits if device == "meta" else flux.keep_in_4_bits),
        patch.object(flux, "stream_into", lambda *_: None),
        patch.object(adapters, "stream_into", lambda *_: None),
        patch.object(PreTrainedModel, "from_pretrained", classmethod(of_transformers)),
    ):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build models in it at once: in float32 first those of twelve billion weights would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def judges_of(trainer: Namespace) -> list[Reward]:
    """The reward models of RewardTracking, which are on the device while it evaluates."""
    parser = LightningArgumentParser()
    parser.add_argument("--judges", type=list[Reward])
    chosen = [c.init_args for c in trainer.callbacks or [] if c.class_path.endswith(".RewardTracking")]
    judges = [judge for own in chosen for judge in (own.judge, *(own.get("metrics") or {}).values())]
    return list(parser.instantiate_classes(Namespace(judges=judges)).judges)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' advice on models that are built and not read."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
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
    if re.search("adamw?8bit$", config.model.optimizer.class_path, re.IGNORECASE):
        config.model.optimizer = Namespace(
            class_path=f"{EightBitStates.__module__}.EightBitStates", init_args=Namespace()
        )
    eager(config)
    module = build(config)
    averages = [c for c in config.trainer.callbacks or [] if c.class_path.endswith(".EMA")]
    ema = EMA(**vars(averages[0].init_args)) if averages else None
    if hasattr(module.objective, "num_rollout_steps"):
        module.objective.num_rollout_steps = 1  # no more at a time, however many there are
    tracker = MemoryTracker(ROLLOUT, dict.fromkeys((TRAINED, FROZEN), CASTS))
    with ExitStack() as stack:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        strategy = stack.enter_context(sharded(config.trainer)) if is_sharded(config.trainer) else None
        judges = judges_of(config.trainer)
        with without_weights():
            for judge in judges:
                judge.load()
            module.policy.load(None if strategy is None else in_mode(mode, strategy.shard))
            module.reward.load()
        stack.enter_context(mode)
        if target == "cuda":
            stack.enter_context(cuda_operations())
        make_fake(module)
        for judge in judges:
            make_fake(judge)
        try:
            conditions = fake_conditions(config, config.data.batch_size)
            lasting = train(module, conditions, config.trainer, ema, tracker, on_cuda=target == "cuda")
            if judges:
                conditions = fake_conditions(config, config.data.eval_batch_size)
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


def build(config: Namespace) -> SRPOModule:
    """The configured module, its models not yet loaded."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SRPOModule, "model")
    module: SRPOModule = parser.instantiate_classes(Namespace(model=config.model.clone())).model
    return module


def is_sharded(trainer: Namespace) -> bool:
    """Whether the strategy is FSDP2."""
    return str(getattr(trainer.strategy, "class_path", "")).endswith(".ShardedStrategy")


def num_devices(trainer: Namespace) -> int:
    """How many there are in all."""
    if is_sharded(trainer):
        return int(trainer.strategy.init_args.shard_size * trainer.strategy.init_args.replicate_size)
    return int(trainer.num_nodes) * devices_per_node(trainer)


def devices_per_node(trainer: Namespace) -> int:
    """How many there are on each; `auto`, which depends on the machine, counts as one."""
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    return int(devices) if str(devices).isdecimal() else 1


@contextmanager
def sharded(trainer: Namespace) -> Iterator[ShardedStrategy]:
    """The configured strategy, on the first of so many ranks, of which there are no others."""
    strategy = ShardedStrategy(**vars(trainer.strategy.init_args))
    size = strategy.shard_size * strategy.replicate_size
    strategy.parallel_devices = [torch.device("cpu")] * size
    if trainer.precision == "bf16-mixed":
        strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        strategy.make_mesh("cpu")
        yield strategy
    finally:
        destroy_process_group()


def in_mode(mode: FakeTensorMode, shard: Shard) -> Shard:
    """Give sharded parameters fake memory."""

    def fake(model: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> None:
        with mode:
            shard(model, blocks)

    return fake


def make_fake(module: torch.nn.Module) -> None:
    """Put fake tensors, as the active mode makes them, in the place of a model's parameters and buffers."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue  # made in the mode
            fake = torch.empty_like(parameter, device="cpu")
            setattr(owner, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.empty_like(buffer, device="cpu"))


def fake_conditions(config: Namespace, size: int) -> Conditions:
    """A batch of the shapes that the data module would hand out; of several sizes of pictures the largest."""
    sizes = [(height, width) for width, height in config.data.get("sizes") or []]
    pretrained = config.model.policy.init_args.pretrained
    transformer = read_json(pretrained, "transformer", "config.json")
    length = config.data.max_sequence_length
    if length is None:
        length = min(512, int(read_json(pretrained, "tokenizer_2", "tokenizer_config.json")["model_max_length"]))
    dtype = getattr(torch, config.data.text_dtype)
    return Conditions(
        [f"prompt {i}" for i in range(size)],
        torch.zeros(size, length, transformer["joint_attention_dim"], dtype=dtype),
        torch.zeros(size, transformer["pooled_projection_dim"], dtype=dtype),
        torch.zeros(size, dtype=torch.int64),
        max(sizes, key=math.prod, default=None),
    )
