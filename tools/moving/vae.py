"""The causal autoencoder: clips of 9 frames of 64 x 64 to 3 x 8 x 8 latents and back."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor

from tools.emoji.training import Trainee
from tools.emoji.vae import LATENT_NOISE, psnr

from .motions import NUM_FRAMES, SIZE_PX, clips, poses

CHANNELS = 16
STRIDE = 4


def new_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Wan 2.2's kind of autoencoder, small: cells of 2 x 2 pixels, then two halvings in space and in time."""
    return AutoencoderKLWan(
        base_dim=48,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=mean or [0.0] * CHANNELS,
        latents_std=std or [1.0] * CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )


def as_pictures(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same network; a frame without a past is convolved by the last slice of each kernel, the others meet zeros."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = partial(_causal, module)  # type: ignore[method-assign]
    return vae


def _causal(convolution: WanCausalConv3d, x: Tensor, cache: Tensor | None = None) -> Tensor:
    if x.shape[2] > 1 or cache is not None or convolution.stride[0] > 1:
        return WanCausalConv3d.forward(convolution, x, cache)
    left, _, top, _, _, _ = convolution._padding
    return F.conv3d(
        x, convolution.weight[:, :, -1:], convolution.bias, convolution.stride, (0, top, left)
    )


class Coder:
    """Encoding and decoding in two pieces, the first frame and the rest, as the model's own pieces of one latent frame."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    def encode(self, frames: Tensor) -> Tensor:
        """Means [B, C, 1 + (F - 1) / 4, 8, 8] of frames [B, 3, F, 64, 64] in [-1, 1]."""
        return self._pieces(self.vae.encoder, patchify(frames, 2), self.vae.quant_conv)[:, :CHANNELS]

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, F, 64, 64] around [-1, 1] of latents."""
        return unpatchify(self._pieces(partial(self.vae.decoder), self.vae.post_quant_conv(latents)), 2)

    def _pieces(self, part: Any, x: Tensor, after: Any = None) -> Tensor:
        cache: list[Any] = [None] * 64
        found = []
        for piece in (x[:, :, :1], x[:, :, 1:]):
            if piece.shape[2]:
                more = {"first_chunk": not found} if part is not self.vae.encoder else {}
                found.append(part(piece, feat_cache=cache, feat_idx=[0], **more))
        joined = torch.cat(found, 2)
        return after(joined) if after else joined
