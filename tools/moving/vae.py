"""The causal autoencoder: clips of 9 frames of 64 x 64 to 3 x 8 x 8 latents and back."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor

from tools.emoji.training import Trainee
from tools.emoji.vae import LATENT_NOISE, psnr, reconstruction_loss

from .motions import MOTIONS, NUM_FRAMES, Poses, clips, poses

CHANNELS = 16
PATCH = 2
MOST_CONVOLUTIONS = 64


def new_vae() -> AutoencoderKLWan:
    """Wan 2.2's kind of autoencoder, small: cells of 2 x 2 pixels, then two halvings in space and in time."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
    )


def as_pictures(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same network; a frame without a past is convolved by the last slice of each kernel, the others meet zeros."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = partial(_causal, module)
    return vae


def _causal(convolution: WanCausalConv3d, x: Tensor, cache: Tensor | None = None) -> Tensor:
    if x.shape[2] > 1 or cache is not None or convolution.stride[0] > 1:
        return WanCausalConv3d.forward(convolution, x, cache)
    left, _, top, _, _, _ = convolution._padding
    return F.conv3d(x, convolution.weight[:, :, -1:], convolution.bias, convolution.stride, (0, top, left))


def encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Means [B, C, 1 + (F - 1) / 4, 8, 8] of frames [B, 3, F, 64, 64] in [0, 1]."""
    pieces = _in_two_pieces(vae.encoder, patchify(frames * 2 - 1, PATCH))
    return vae.quant_conv(pieces)[:, :CHANNELS]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames [B, 3, F, 64, 64] around [-1, 1] of latents."""

    def decoder(piece: Tensor, **cache: Any) -> Tensor:
        return vae.decoder(piece, first_chunk=cache["feat_cache"][0] is None, **cache)

    return unpatchify(_in_two_pieces(decoder, vae.post_quant_conv(latents)), PATCH)


def _in_two_pieces(part: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The first frame and all others, as the model's own pieces of one latent frame are, but fewer."""
    cache: list[Any] = [None] * MOST_CONVOLUTIONS
    return torch.cat(
        [part(own, feat_cache=cache, feat_idx=[0]) for own in (x[:, :, :1], x[:, :, 1:]) if own.numel()], 2
    )


class VAETraining(Trainee):
    """Autoencoding with unit-variance latents, of single frames or of clips.

    Each latent channel is normalised by its batch statistics and gets a fixed amount of noise, as in
    `tools.emoji.vae.VAETraining`.

    Args:
        vae: network that is trained.
        layers: [concept * style, 4, 64, 64], see `tools.emoji.world.World.layers`.
        is_still: whether one frame of each clip is shown; a causal autoencoder learns most from these, and fast.
    """

    net: AutoencoderKLWan

    def __init__(
        self, vae: AutoencoderKLWan, layers: Tensor, steps: int, seed: int, is_still: bool, batch: int, lr: float
    ) -> None:
        super().__init__(as_pictures(vae), steps, seed, muon_lr=0.0, adam_lr=lr)
        self.layers, self.is_still, self.batch = layers, is_still, batch

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction at `LATENT_NOISE`."""
        rows = torch.randint(len(self.layers), (self.batch,), generator=draw)
        where = poses(torch.randint(len(MOTIONS), (self.batch,), generator=draw), draw)
        if self.is_still:
            frame = int(torch.randint(NUM_FRAMES, (), generator=draw))
            where = Poses(*(own[:, frame : frame + 1] for own in where))
        shown = clips(self.layers[rows], where)
        latents = self.latents(shown)
        decoded = decode(self.net, latents + LATENT_NOISE * torch.randn(latents.shape, generator=draw)).float()
        wanted = shown * 2 - 1
        return {"loss": reconstruction_loss(decoded, wanted), "psnr": psnr(decoded, wanted)}

    def latents(self, shown: Tensor) -> Tensor:
        """What is decoded, [B, C, T, 8, 8], of frames [B, 3, F, 64, 64] in [0, 1]."""
        means = encode(self.net, shown).float()
        centre, spread = (own(means, (0, 2, 3, 4), keepdim=True) for own in (torch.mean, torch.std))
        return (means - centre) / (spread + 1e-4)


class DecoderTraining(VAETraining):
    """The decoder alone on clips: latents that a Wan already learns stay what they are.

    Args:
        vae: folded result of `VAETraining`.
    """

    def __init__(
        self, vae: AutoencoderKLWan, layers: Tensor, steps: int, seed: int, batch: int = 6, lr: float = 1e-3
    ) -> None:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        super().__init__(vae, layers, steps, seed, False, batch, lr)

    @torch.no_grad()
    def latents(self, shown: Tensor) -> Tensor:
        """The encoder's means as they are."""
        return encode(self.net, shown).float()


@torch.no_grad()
def fold(vae: AutoencoderKLWan, shown: Tensor) -> AutoencoderKLWan:
    """Write the mean and spread of the latents of clips into the encoder's last convolution."""
    means = torch.cat([encode(vae, part) for part in shown.split(20)])
    centre, spread = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    last = vae.quant_conv
    last.weight[:CHANNELS] /= spread[:, None, None, None, None]
    last.bias[:CHANNELS] = (last.bias[:CHANNELS] - centre) / spread
    last.weight[CHANNELS:] = 0
    last.bias[CHANNELS:] = 2 * math.log(LATENT_NOISE)
    return vae


@torch.no_grad()
def mean_psnr(vae: AutoencoderKLWan, shown: Tensor) -> float:
    """Mean over clips of the PSNR in dB after encoding and decoding."""
    parts = [(decode(vae, encode(vae, part)) / 2 + 0.5).clamp(0, 1) for part in shown.split(20)]
    error = (torch.cat(parts) - shown).square().mean((1, 2, 3, 4))
    return float((-10 * error.log10()).mean())
