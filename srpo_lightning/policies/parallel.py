"""How a transformer's blocks run: which attention kernel they call, and whether they are compiled.

What is divided over ranks is the strategy's, and of tokens divided.py's; recomputing blocks is one call of diffusers'.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ATTENTION = (
    "native",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "flex",
    "flash",
    "xformers",
)
"""diffusers' names of attention kernels with a gradient.

The others have none (sage, _flash_3) or a wrong one (_native_cudnn), are for other machines (_native_npu, _native_xla),
wait for the device in every call (_varlen), or are fetched from the hub as compiled code (_hub).
"""

WITHOUT_MASKS = ("_native_flash", "flash")
"""Those that attend to everything."""


def leave_cudnn_attention_alone() -> None:
    """Take cuDNN's kernel from those that torch chooses attention from, in the whole process.

    Torch 2.11 prefers it for half precision on Hopper. In FLUX's blocks its backward pass (compute_dot_do_o_specialized
    of cuDNN 9.19) read outside its tensors: training ended in an illegal memory access, or had gradients that were not
    finite (docs/gpu.md). With masks they are not finite in torch 2.13 either:
    https://github.com/pytorch/pytorch/issues/196678
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_attention(name: str, *, masks: bool = False) -> None:
    """Refuse a kernel that blocks could not be trained with.

    Args:
        name: of the kernel.
        masks: whether the blocks leave the padding of texts out by a mask.

    Raises:
        ValueError: listing the ones whose packages are here.
    """
    usable = [known for known in ATTENTION if _is_installed(known) and not (masks and known in WITHOUT_MASKS)]
    if name not in usable:
        raise ValueError(
            f"attention is {name!r}, which is no attention kernel of diffusers that has a gradient"
            f"{', takes the masks of this model' if masks else ''} and is installed: choose from {', '.join(usable)}"
        )


def check_choice(transformer: nn.Module, family: str) -> None:
    """Refuse a choice of a kernel where the blocks call torch's attention whatever was chosen.

    Args:
        transformer: with or without memory.
        family: name of the policy's class, for the message.

    Raises:
        ValueError: naming the setting.
    """
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in transformer.modules()):
        raise ValueError(
            f"attention is set, but the blocks of {family} call torch's attention whatever is chosen: set it to null"
        )


def choose_attention(transformer: Any, name: str) -> None:
    """Have a transformer's blocks call a kernel, and no other model's."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend():  # the choice for one model is made the whole process's too: this gives that its own back
        transformer.set_attention_backend(name)


def _is_installed(name: str) -> bool:
    try:
        from diffusers.models.attention_dispatch import attention_backend  # takes long to import

        with attention_backend(name):
            return True
    except RuntimeError:  # says which package is missing
        return False


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block in place when it first runs: names of parameters and checkpoints stay.

    Blocks of one kind share their code. The first sizes are compiled as they are, and of the next ones those that
    differ become symbols: rollout, trained step and evaluation have different batches, and there may be several sizes
    of pictures, each with and without gradient, hence a limit above torch's 8. Before blocks are divided over ranks:
    the gathering of their weights stays out of the compiled code.

    Args:
        blocks: of a transformer.
        backend: of torch.compile; aot_eager traces without generating code.
    """
    for block in blocks:
        block.compile(backend=backend, recompile_limit=32)
