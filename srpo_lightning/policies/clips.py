"""Clips, decoded one latent frame after the other: which frames a reward sees, and a causal VAE with gradient.

Source: diffusers' AutoencoderKLWan. Its first latent frame is one frame of the clip, each further one is four. Every
causal convolution hands its last two inputs to the next latent frame.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpo_lightning.draws import Draws
from srpo_lightning.picture_statistics import evenly
from srpo_lightning.policies.family import Images
from srpo_lightning.policies.per_channel_vae import Encoded, PictureVAE

FrameChoice = Literal["first", "even", "random"]

FRAMES = "frames"
"""What draws of frames are for."""

Cache = list[Any]
"""What each causal convolution keeps for the next latent frame; None before the first."""


def chosen_frames(choice: FrameChoice, number: int, num_frames: int, draws: Draws) -> list[int]:
    """Frames of a clip that a reward of pictures sees, in their order.

    Args:
        choice: first takes those at the beginning, even spreads them from the first to the last, and random draws them
            for each micro-batch.
        number: how many; all, where the clip has fewer.
        num_frames: frames of the clip.
        draws: randomness of the micro-batch.
    """
    number = min(number, num_frames)
    if choice == "first":
        return list(range(number))
    if choice == "random":
        return draws.subset(FRAMES, [1.0] * num_frames, number)
    return evenly(number, num_frames)


class ClipVAE(PictureVAE):
    """AutoencoderKLWan for clips, and for pictures, which are clips of one frame."""

    def __init__(self, video: Any) -> None:
        super().__init__(video)
        self.mean, self.std = self.mean[:, None], self.std[:, None]  # [c, 1, 1, 1]
        self.recomputes = False

    @property
    def stride(self) -> int:
        """Frames of the clip that a latent frame stands for, but for the first, which is one."""
        return int(self.video.config.scale_factor_temporal)

    def encode(self, pixels: Float[Tensor, "B 3 *F H W"]) -> Encoded:
        """Pictures or clips in [-1, 1] to the posterior of their latents, a clip's one latent frame after the other."""
        return Encoded(self.video.encode(pixels).latent_dist) if pixels.ndim == 5 else super().encode(pixels)

    def frames(self, z: Float[Tensor, "B c T h w"], wanted: Sequence[int]) -> list[Images]:
        """Frames of a clip around [-1, 1], with gradient; no latent frame behind the last of them is read.

        Args:
            z: latents as the VAE has them.
            wanted: numbers of frames.
        """
        z = z[:, :, : -(-max(wanted) // self.stride) + 1]
        if self.video.use_tiling and not (self.recomputes and z.requires_grad):  # whose tiles could not be recomputed
            clip = self.video.decode(z, return_dict=False)[0]
        elif z.shape[2] == 1:
            clip = self.decode_frame(z)
        else:
            clip = torch.cat(self._frame_by_frame(self.video.post_quant_conv(z)), dim=2)
        return [clip[:, :, frame] for frame in wanted]

    def decode_frame(self, frames: Tensor) -> Tensor:
        """A first latent frame alone, which repeats nothing in time."""
        return self._pixels(self.video.decoder(self.video.post_quant_conv(frames), first_chunk=True))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block where a clip has one latent frame, else each latent frame."""
        super().enable_gradient_checkpointing()
        self.recomputes = True

    @staticmethod
    def recomputed(forward: Callable[..., Tensor], x: Tensor, *rest: Any, **settings: Any) -> Tensor:
        """The same, unless it has a cache, which the next latent frame goes on from."""
        has_cache = settings.get("feat_cache") is not None
        return forward(x, *rest, **settings) if has_cache else PictureVAE.recomputed(forward, x, **settings)

    def _frame_by_frame(self, z: Tensor) -> list[Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d  # only a loaded VAE needs it

        convolutions = sum(isinstance(module, WanCausalConv3d) for module in self.video.decoder.modules())
        cache: Cache = [None] * convolutions
        parts = []
        for place, latent in enumerate(z.split(1, dim=2)):
            if self.recomputes:
                pixels, cache = checkpoint(self._next, latent, cache, place == 0, use_reentrant=False)
            else:
                pixels, cache = self._next(latent, cache, place == 0)
            parts.append(pixels)
        return parts

    def _next(self, latent: Tensor, cache: Cache, is_first: bool) -> tuple[Tensor, Cache]:
        after = list(cache)
        return self._pixels(self.video.decoder(latent, feat_cache=after, feat_idx=[0], first_chunk=is_first)), after

    def _pixels(self, decoded: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        side = self.video.config.patch_size
        return decoded if side is None else unpatchify(decoded, side)
