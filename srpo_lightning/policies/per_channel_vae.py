"""A VAE of videos for pictures, with a mean and a deviation per channel of its latents: Qwen-Image's and Krea 2's.

Source: diffusers' AutoencoderKLQwenImage; `_unpack_latents` and the decoding of QwenImagePipeline and Krea2Pipeline.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srpo_lightning.batch import Size
from srpo_lightning.policies.family import Images, Latents, PackedFamily
from srpo_lightning.policies.packing import Spatial, pack, unpack


class Encoded(NamedTuple):
    """What diffusers' VAEs of pictures encode to."""

    latent_dist: Any


class PictureVAE(nn.Module):
    """A VAE of videos that takes pictures, each a video of one frame, by the methods of diffusers' AutoencoderKL.

    Args:
        video: AutoencoderKLQwenImage, or a VAE of the same parts.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, video: Any) -> None:
        super().__init__()
        self.video = video
        for name in ("mean", "std"):
            values = torch.tensor(video.config[f"latents_{name}"]).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, pixels: Images) -> Encoded:
        """Pictures in [-1, 1] to the posterior of their latents."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # only a loaded VAE needs it

        posterior = self.video.encode(pixels[:, :, None]).latent_dist
        return Encoded(DiagonalGaussianDistribution(posterior.parameters[:, :, 0]))

    def decode(self, z: Spatial, return_dict: bool = False) -> tuple[Images]:
        """Latents to pictures around [-1, 1], with gradient.

        The cache that the VAE hands from frame to frame would hold every activation of the only frame once more.
        """
        assert not return_dict, "of pictures there is a tuple"
        frames = z[:, :, None]
        if self.video.use_tiling:
            decoded = self.video.decode(frames, return_dict=False)[0]
        else:
            decoded = self.decode_frame(frames)
        return (decoded[:, :, 0],)

    def decode_frame(self, frames: Tensor) -> Tensor:
        """Latents [B, c, 1, h, w] to pixels [B, 3, 1, H, W], without the cache."""
        decoded: Tensor = self.video.decoder(self.video.post_quant_conv(frames))
        return decoded

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block of the decoder in the backward pass, for which diffusers has no switch here."""
        for block in (self.video.decoder.mid_block, *self.video.decoder.up_blocks):
            block.forward = partial(self.recomputed, block.forward)

    @staticmethod
    def recomputed(forward: Callable[..., Tensor], x: Tensor, *_: Any, **settings: Any) -> Tensor:
        """A block that is computed again in the backward pass, without the cache of the frames before."""
        told = {name: value for name, value in settings.items() if not name.startswith("feat_")}
        found: Tensor = checkpoint(partial(forward, **told), x, use_reentrant=False)
        return found

    def enable_tiling(self) -> None:
        """Decode large pictures tile by tile."""
        self.video.enable_tiling()


class PerChannelFamily(PackedFamily):
    """A family that reads 2 x 2 cells of a video VAE's latents as tokens, each channel with a scale of its own."""

    vae_class = "AutoencoderKLQwenImage"

    def read_vae(self, dtype: torch.dtype) -> PictureVAE:
        """The VAE with its weights, of pictures."""
        return PictureVAE(super().read_vae(dtype))

    def to_vae(self, vae: PictureVAE, latents: Latents, size: Size) -> Spatial:
        """Unpacked, with the VAE's deviations and means."""
        return unpack(latents, size) * vae.std + vae.mean

    def from_vae(self, vae: PictureVAE, z: Spatial) -> Latents:
        """Normalised and packed."""
        return pack((z - vae.mean) / vae.std)
