"""How a transformer comes to its weights: whole, in 4 bits, or divided over ranks, with or without adapters."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from srpo_lightning.files.pretrained import (
    check_names,
    load_whole,
    read_json,
    safetensors_files,
    same_files,
    stream_into,
)
from srpo_lightning.policies import adapters
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.policies.base import Shard
from srpo_lightning.policies.parallel import choose_attention, compile_blocks
from srpo_lightning.policies.rounded import RoundedBlocks
from srpo_lightning.training.allocator import trim_freed_memory
from srpo_lightning.training.nf4 import keep_in_4_bits

STEM = "diffusion_pytorch_model"
"""The beginning of the weight files' names."""


class Loaded(Protocol):
    """What is asked of a policy here."""

    dtype: torch.dtype
    adapter: Lora | None
    attention: str | None
    compiles_blocks: bool

    @property
    def quantize(self) -> str:
        """Bits of the blocks' linear layers."""

    @property
    def quantize_dir(self) -> str | None:
        """Folder of blocks that were rounded."""

    @property
    def diffusers_class(self) -> Any:
        """The transformer's class."""

    @property
    def idle(self) -> tuple[str, ...]:
        """Beginnings of the names of weights that no gradient reaches."""

    @property
    def start_place(self) -> tuple[str, str]:
        """Where the transformer's weights are."""

    def empty_transformer(self) -> Any:
        """The transformer without memory and without adapters."""

    def outline(self) -> Any:
        """The transformer without memory."""


def blocks(transformer: Any) -> list[tuple[str, nn.Module]]:
    """The transformer's blocks by name: what is sharded, compiled, adapted and quantized one by one.

    They are the modules in numbered lists whose class must not be split (`_no_split_modules` of diffusers' models).
    """
    classes = set(transformer._no_split_modules or ())  # of diffusers' own interface to accelerate
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if type(module).__name__ in classes and name.rpartition(".")[2].isdecimal()
    ]


def empty(cls: Any, config: dict[str, Any]) -> Any:
    """A transformer of that configuration on the meta device; buffers have their values."""
    from accelerate import init_empty_weights  # takes long to import

    with unfilled(), init_empty_weights(include_buffers=False):  # each weight is on the CPU for a moment
        return cls.from_config(config)


@contextmanager
def unfilled() -> Iterator[None]:
    """Without filling memory that nobody reads, as torch does with trainer.deterministic: minutes for FLUX.1."""
    flags: Any = torch.utils.deterministic  # whose type does not tell
    before = flags.fill_uninitialized_memory
    flags.fill_uninitialized_memory = False
    try:
        yield
    finally:
        flags.fill_uninitialized_memory = before


def cast(transformer: Any, dtype: torch.dtype) -> Any:
    """The transformer in a dtype, in place, but for what diffusers keeps in float32 when it reads weights."""
    kept = set(transformer._keep_in_fp32_modules or ())

    def own(name: str, tensor: Tensor) -> Tensor:
        is_kept = not kept.isdisjoint(name.split("."))
        return tensor.to(torch.float32 if is_kept else dtype) if tensor.is_floating_point() else tensor

    for name, parameter in transformer.named_parameters():
        parameter.data = own(name, parameter.data)
    for prefix, module in transformer.named_modules():
        for name, buffer in module.named_buffers(recurse=False):  # fake tensors cannot be made of a changed one
            setattr(module, name, own(f"{prefix}.{name}", buffer))
    return transformer


def read(policy: Loaded) -> Any:
    """The transformer with all its weights, those of its blocks in 4 bits if so asked."""
    if policy.quantize == "none":
        transformer: Any = load_whole(policy.diffusers_class, *policy.start_place, torch_dtype=policy.dtype)
    else:
        transformer = read_in_4_bits(policy)
        transformer.is_loaded_in_4bit = True  # peft asks
    if policy.adapter is not None:
        adapters.add(transformer, policy.adapter, blocks(transformer), policy.idle)
    _prepare_blocks(policy, transformer)
    return transformer


def read_in_4_bits(policy: Loaded) -> Any:
    """The transformer whose blocks are read, rounded and freed one by one; it is never in memory whole.

    A block that an earlier start has rounded and kept is read as it is.
    """
    transformer = cast(policy.empty_transformer(), policy.dtype).eval().requires_grad_(False)
    files = safetensors_files(*policy.start_place, STEM)
    check_names(adapters.base_tensors(transformer), files)
    source = f"{same_files(files.values())} {type(transformer).__name__} {policy.dtype} {policy.quantize}"
    kept = RoundedBlocks(policy.quantize_dir, f"{source} {dict(transformer.config)}")
    for name, block in tqdm(blocks(transformer), desc="4 bits", unit="block", disable=None, leave=False):
        own = {key: files.pop(key) for key in [f"{name}.{key}" for key in adapters.base_tensors(block)]}
        if not kept.read(name, block):
            give_memory(block)
            stream_into({f"{name}.{key}": tensor for key, tensor in adapters.base_tensors(block).items()}, own)
            keep_in_4_bits(block, double=policy.quantize == "nf4-double")
            kept.keep(name, block)
            trim_freed_memory()
    give_memory(transformer)
    tensors = adapters.base_tensors(transformer)
    stream_into({name: tensors[name] for name in files}, files)
    return transformer


def is_meta(tensor: Tensor) -> bool:
    """Whether a tensor is without memory."""
    return tensor.is_meta


def give_memory(module: nn.Module, wanted: Callable[[Tensor], bool] = is_meta) -> None:
    """Put tensors on the CPU, not yet filled, in the place of a model's parameters and buffers that are wanted."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if wanted(parameter):
                empty = torch.empty_like(parameter, device="cpu")
                setattr(owner, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in owner.named_buffers(recurse=False):
            if wanted(buffer):
                setattr(owner, name, torch.empty_like(buffer, device="cpu"))


def stream(policy: Loaded, shard: Shard) -> Any:
    """The transformer divided over the ranks, each of which reads its own part only.

    Raises:
        ValueError: naming the cure, if its trained weights are of several dtypes, which FSDP2 does not divide.
    """
    transformer = policy.outline()
    trained = {parameter.dtype for parameter in transformer.parameters() if parameter.requires_grad}
    if len(trained) > 1:
        raise ValueError(
            f"dtype is {str(policy.dtype)[6:]}, of which {type(transformer).__name__} keeps its norms in float32, and "
            "ShardedStrategy divides trained weights of one dtype alone: set model.policy.init_args.dtype to float32, "
            "or give an adapter"
        )
    _prepare_blocks(policy, transformer)
    shard(transformer, [block for _, block in blocks(transformer)])
    fill(policy, transformer)
    return transformer


def fill(policy: Loaded, transformer: Any) -> None:
    """Put the weights before training in their place, adapters left alone."""
    stream_into(adapters.base_tensors(transformer), safetensors_files(*policy.start_place, STEM))


def _prepare_blocks(policy: Loaded, transformer: Any) -> None:
    if policy.attention is not None:
        choose_attention(transformer, policy.attention)
    if policy.compiles_blocks:
        compile_blocks(block for _, block in blocks(transformer))


def own_cache(transformer: Any, name: str) -> AbstractContextManager[None]:
    """Around a pass that goes on from the features of the last pass of that name alone, where features are cached."""
    found: AbstractContextManager[None] = nullcontext()
    return transformer.cache_context(name) if getattr(transformer, "is_cache_enabled", False) else found


@contextmanager
def unrounded(transformer: Any, told: list[Tensor]) -> Iterator[None]:
    """Give the embedding of level and guidance what was told, in place of what the transformer rounded.

    The transformer casts both to the dtype of its first activations before it embeds them (diffusers,
    FluxTransformer2DModel.forward).
    """

    def replace(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*told, *arguments[len(told) :])

    handle = transformer.time_text_embed.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def transformer_config(pretrained: str, start: str | None, tied: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of the transformer to start from.

    Args:
        pretrained: the pipeline.
        start: another transformer; None: the pipeline's own.
        tied: numbers of it that must be the pipeline's.

    Raises:
        ValueError: naming the cure, if it is none, or of another kind of model.
    """
    base = read_json(pretrained, "transformer", "config.json")
    if start is None:
        return base
    folder = Path(start).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model.policy.init_args.transformer is {start}, which holds no config.json: give a transformer's own "
            "folder, as `export` writes it with --format diffusers; a pipeline's is its transformer/"
        )
    config = read_json(start, "", "config.json")
    for name in tied:
        if config.get(name) != base.get(name):
            raise ValueError(
                f"model.policy.init_args.transformer is {start}, whose {name} is {config.get(name)} where that of "
                f"pretrained is {base.get(name)}: give a transformer that was made from the model in pretrained"
            )
    return config


def check_compiled(adapter: Lora | None, rollout_cache: float | None) -> None:
    """Refuse what compiled blocks cannot do.

    Raises:
        ValueError: naming the settings.
    """
    if adapter is not None and adapter.dora:
        raise ValueError("peft's DoRA cannot be compiled: set model.policy.init_args.compile or adapter.dora to false")
    if rollout_cache is not None:
        raise ValueError(
            "a cache of features comes and goes with every rollout, and compiled blocks would be compiled anew for "
            "each: set model.policy.init_args.compile to false, or rollout_cache to null"
        )
