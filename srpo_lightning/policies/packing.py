"""Latents as FLUX.1, FLUX.2, Qwen-Image and Krea 2 read them: 2 x 2 cells of the VAE's latents are one token.

Source: `_pack_latents`, `_unpack_latents` and `_prepare_latent_image_ids` of diffusers' FluxPipeline.
"""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from srpo_lightning.batch import Size

Packed: TypeAlias = Float[Tensor, "B L C"]
Spatial: TypeAlias = Float[Tensor, "B c h w"]

VAE_FACTOR = 8
"""Pixels along a side of one of the VAE's latents: it halves three times."""

CELL = 2 * VAE_FACTOR
"""Pixels along a token's side."""


def pack(z: Spatial) -> Packed:
    """2 x 2 patches of the VAE's latents to tokens, in the channel order of FLUX."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(x: Packed, size: Size) -> Spatial:
    """Undo `pack` for a picture of that size."""
    h, w = (side // CELL for side in size)
    b, _, c = x.shape
    return x.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def image_ids(size: Size, like: Tensor) -> Float[Tensor, "L 3"]:
    """Position ids of the image tokens: (0, row, column)."""
    h, w = (side // CELL for side in size)
    # Made where they are read: a copy to a GPU would make the host wait at every step of a rollout.
    rows, columns = torch.meshgrid(
        torch.arange(h, device=like.device), torch.arange(w, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(like)
