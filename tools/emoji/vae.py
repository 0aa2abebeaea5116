"""The autoencoder: 64 x 64 pictures to 8 x 8 x 16 latents and back."""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .training import Trainee

LATENT_NOISE = 0.1  # standard deviation of the posterior: how far off a generated latent may be at no cost


def new_vae(channels: tuple[int, ...] = (16, 32, 64, 128)) -> AutoencoderKL:
    """FLUX's kind of autoencoder, small."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, along both axes."""
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + squared error + L1 of the gradients, which keeps lines crisp."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(decoded), gradients(images), strict=True))
    return F.l1_loss(decoded, images) + 4 * F.mse_loss(decoded, images) + torch.as_tensor(edges)


def draw_images(images: Tensor, batch: int, draw: torch.Generator) -> Tensor:
    """A batch in [-1, 1], half of it as it is, half shifted by up to 6 pixels and mirrored."""
    rows = torch.randint(len(images), (batch,), generator=draw)
    drawn = images[rows] * 2 - 1
    half = batch // 2
    down, right = torch.randint(-6, 7, (2,), generator=draw).tolist()
    moved = F.pad(drawn[:half], (6, 6, 6, 6), value=1.0)[..., 6 + down : 70 + down, 6 + right : 70 + right].flip(-1)
    return torch.cat([moved, drawn[half:]]).contiguous(memory_format=torch.channels_last)


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], from the mean error of the batch."""
    return -10 * (F.mse_loss(decoded.clamp(-1, 1), images) / 4).log10()


class VAETraining(Trainee):
    """Autoencoding with unit-variance latents.

    Each latent channel is normalised by its batch statistics and gets a fixed amount of noise: the latents have the
    statistics that a diffusion model wants, with no weight of a KL term to tune. `fold` writes the statistics into
    the encoder's last convolution, after which it is a plain `AutoencoderKL`.

    Args:
        images: [N, 3, 64, 64] in [0, 1].
    """

    net: AutoencoderKL

    def __init__(self, images: Tensor, steps: int, seed: int, batch: int = 24, lr: float = 1.5e-3) -> None:
        super().__init__(new_vae(), steps, seed, muon_lr=0.0, adam_lr=lr)
        self.net.to(memory_format=torch.channels_last)
        self.images, self.batch = images, batch

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction at `LATENT_NOISE`."""
        images = draw_images(self.images, self.batch, draw)
        means = self.net.encoder(images)[:, :16].float()
        centre, spread = means.mean((0, 2, 3), keepdim=True), means.std((0, 2, 3), keepdim=True)
        latents = (means - centre) / (spread + 1e-4)
        decoded = self.net.decoder(latents + LATENT_NOISE * torch.randn(latents.shape, generator=draw)).float()
        return {"loss": reconstruction_loss(decoded, images), "psnr": psnr(decoded, images)}


class DecoderTraining(Trainee):
    """The decoder alone, against a frozen encoder: latents that FLUX already learns stay what they are.

    Args:
        images: [N, 3, 64, 64] in [0, 1].
        vae: folded result of `VAETraining`; its decoder is the start.
    """

    def __init__(
        self, images: Tensor, vae: AutoencoderKL, steps: int, seed: int, batch: int = 32, lr: float = 1.5e-3
    ) -> None:
        super().__init__(vae.decoder, steps, seed, muon_lr=0.0, adam_lr=lr, decay=0.5)
        self.frozen = [vae.encoder.requires_grad_(False)]  # in a list: not a submodule, so in no checkpoint
        self.images, self.batch = images, batch

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction at `LATENT_NOISE`."""
        images = draw_images(self.images, self.batch, draw)
        with torch.no_grad():
            latents = self.frozen[0](images)[:, :16].float()
        decoded = self.net(latents + LATENT_NOISE * torch.randn(latents.shape, generator=draw)).float()
        return {"loss": reconstruction_loss(decoded, images), "psnr": psnr(decoded, images)}


@torch.no_grad()
def fold(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """Write the mean and spread of the latents of `images` into the encoder's last convolution."""
    means = torch.cat([vae.encoder(part * 2 - 1)[:, :16] for part in images.split(100)])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    last = vae.encoder.conv_out
    last.weight[:16] /= spread[:, None, None, None]
    last.bias[:16] = (last.bias[:16] - centre) / spread
    last.weight[16:] = 0
    last.bias[16:] = 2 * math.log(LATENT_NOISE)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents [N, 16, 8, 8] of images [N, 3, 64, 64] in [0, 1], as FLUX sees them."""
    means = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(100)])
    scaled: Tensor = (means - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [N, 3, 64, 64] in [0, 1] of latents [N, 16, 8, 8]."""
    parts = (latents / vae.config.scaling_factor + vae.config.shift_factor).split(100)
    return torch.cat([vae.decode(part).sample.float() / 2 + 0.5 for part in parts]).clamp(0, 1)
