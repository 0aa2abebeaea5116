"""A transformer whose tokens are divided over the ranks of a group: Ulysses (arXiv 2309.14509), by diffusers.

Every rank has as many tokens of picture and text. In attention they exchange them for heads: each has all tokens of its
heads there. Where the tokens are put together again, the output is whole on every rank.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from srpo_lightning.batch import Size, Text
from srpo_lightning.training.context import Context

KERNELS = ("native", "_native_flash", "flash")
"""diffusers' names of attention kernels that it has a divided form of, among those with a gradient."""

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Names of what normalises queries and keys in diffusers' attention."""

SETTING = "trainer.strategy's context_parallel"


def check_plan(transformer_class: Any, config: Mapping[str, Any], degree: int) -> None:
    """Refuse a transformer that cannot be divided.

    Args:
        transformer_class: Class of diffusers.
        config: Configuration of the transformer.
        degree: Number of ranks of a group.

    Raises:
        ValueError: naming the setting.
    """
    name = transformer_class.__name__
    if transformer_class._cp_plan is None:
        raise ValueError(
            f"{SETTING} is {degree}, but diffusers has no plan by which the tokens of a {name} are divided over ranks: "
            "set it to 1"
        )
    heads = int(config.get("num_attention_heads") or _default(transformer_class, "num_attention_heads"))
    if heads % degree:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ValueError(
            f"{SETTING} is {degree}, which does not divide the {heads} attention heads of this {name}: set it to one "
            f"of {fitting}"
        )


def check_settings(degree: int, *, compiles: bool, attention: str | None, caches: bool) -> None:
    """Refuse settings of a policy that do not go together with divided tokens.

    Args:
        degree: Number of ranks of a group.
        compiles: Whether blocks are compiled.
        attention: Attention kernel by diffusers' name; None is torch's choice.
        caches: Whether rollouts pass over blocks that change little.

    Raises:
        ValueError: naming the settings.
    """
    policy, cure = "model.policy.init_args", "or that to 1"
    if compiles:
        raise ValueError(
            f"{SETTING} is {degree}, and blocks whose ranks exchange tokens are not compiled: set {policy}.compile to "
            f"false, {cure}"
        )
    if attention not in (None, *KERNELS):
        raise ValueError(
            f"{SETTING} is {degree}, and diffusers has no divided form of the attention kernel {attention}: set "
            f"{policy}.attention to null, or one of {', '.join(KERNELS)}, {cure}"
        )
    if caches:
        raise ValueError(
            f"{SETTING} is {degree}, and rollout_cache would have each rank decide by its own tokens which blocks to "
            f"pass over: set {policy}.rollout_cache to null, {cure}"
        )


def check_picture(degree: int, size: Size, num_tokens: int, cell: int) -> None:
    """Refuse a picture whose tokens do not come out even.

    Raises:
        ValueError: with the cure.
    """
    if num_tokens % degree:
        raise ValueError(
            f"{SETTING} is {degree}, which does not divide the {num_tokens} tokens of a picture of {size[0]} x "
            f"{size[1]} pixels: choose height or width a multiple of {degree * cell}"
        )


def check_text(degree: int, num_tokens: int) -> None:
    """Refuse texts whose tokens do not come out even, and cannot be filled up, for the padding is attended to.

    Raises:
        ValueError: with the cure.
    """
    if num_tokens % degree:
        below = num_tokens - num_tokens % degree
        fitting = " or ".join(str(number) for number in (below, below + degree) if number)
        raise ValueError(
            f"{SETTING} is {degree}, which does not divide the {num_tokens} tokens of a text, and this model attends "
            f"to padding: set data.max_sequence_length to {fitting}"
        )


def divides_text(plan: Mapping[str, Any]) -> bool:
    """Whether the tokens of texts are divided too; otherwise every rank has all of them."""
    return any("encoder_hidden_states" in part for part in plan.values() if isinstance(part, dict))


def filled_up(text: Text, degree: int, *, has_mask: bool) -> Text:
    """The same texts with as many rows as can be divided; a mask leaves the new ones out.

    Args:
        text: Features of the texts, of which sequences are [B, T, D].
        degree: Number of ranks of a group.
        has_mask: Whether attention leaves padding out.

    Raises:
        ValueError: if it does not, and rows are missing.
    """
    length = next(tensor.shape[1] for tensor in text.tensors.values() if tensor.ndim == 3)
    if not has_mask:
        check_text(degree, length)
    missing = -length % degree
    if not missing:
        return text
    lengths = text.lengths
    if lengths is None:
        example = next(iter(text.tensors.values()))
        lengths = torch.full((text.batch_size,), length, device=example.device)
    tensors = {
        name: functional.pad(tensor, (0, 0, 0, missing)) if tensor.ndim == 3 else tensor
        for name, tensor in text.tensors.items()
    }
    return Text(tensors, lengths)


def divide(transformer: Any, context: Context) -> None:
    """Divide the tokens of every pass from now on.

    As diffusers' `enable_parallelism` does, which asks for an accelerator.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks import apply_context_parallel

    own = ContextParallelConfig(ulysses_degree=context.degree, mesh=context.mesh)
    config = ParallelConfig(context_parallel_config=own)
    example = next(transformer.parameters())
    config.setup(context.mesh.get_rank(), context.mesh.size(), example.device, mesh=context.mesh)
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
            for name in NORMS:
                if isinstance(norm := getattr(module, name, None), nn.Module):
                    norm.register_forward_hook(_as_autocast)
    transformer._parallel_config = config
    apply_context_parallel(transformer, own, transformer._cp_plan)


def _default(transformer_class: Any, name: str) -> Any:
    return signature(transformer_class.__init__).parameters[name].default


def _as_autocast(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
    """What attention would round queries and keys to, which the divided one does in its forward pass alone."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output
