"""The VAE of Qwen-Image and Krea 2 as one of pictures, against AutoencoderKLQwenImage on videos of one frame."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from srpo_lightning.policies.per_channel_vae import PerChannelFamily, PictureVAE

SIZE = (64, 48)


def video_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.3, -0.5, 0.1, 1.2], latents_std=[0.7, 2.5, 1.3, 0.4]
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vae.eval().requires_grad_(False)


def latents() -> torch.Tensor:
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def to_vae(vae: PictureVAE, x: torch.Tensor) -> torch.Tensor:
    return PerChannelFamily.to_vae(None, vae, x, SIZE)


def decode(vae: PictureVAE, x: torch.Tensor) -> torch.Tensor:
    return vae.decode(to_vae(vae, x))[0].clamp(-1, 1)


def test_pictures_are_the_videos_only_frame():
    video, x = video_vae(), latents()
    z = x.view(2, 4, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 1, 8, 6)
    mean, std = (torch.tensor(video.config[f"latents_{name}"]).view(1, 4, 1, 1, 1) for name in ("mean", "std"))
    expected = video.decode(z * std + mean, return_dict=False)[0]
    torch.testing.assert_close(decode(PictureVAE(video), x), expected[:, :, 0], rtol=0, atol=1e-6)


def test_latents_of_pictures_are_the_videos():
    video, pixels = video_vae(), torch.rand(2, 3, *SIZE) * 2 - 1
    vae = PictureVAE(video)
    theirs, ours = video.encode(pixels[:, :, None]).latent_dist, vae.encode(pixels).latent_dist
    assert torch.equal(ours.mode(), theirs.mode()[:, :, 0])
    assert torch.equal(ours.std, theirs.std[:, :, 0])
    packed = PerChannelFamily.from_vae(None, vae, ours.mode())
    torch.testing.assert_close(to_vae(vae, packed), ours.mode())


@pytest.mark.parametrize("is_tiled", [False, True])
def test_recomputing_the_decoders_blocks_leaves_pictures_and_gradients_as_they_are(is_tiled):
    found = []
    for recomputes in (False, True):
        vae, x = PictureVAE(video_vae()), latents().requires_grad_()
        if is_tiled:
            vae.video.enable_tiling(32, 32, 24, 24)
        stored = []
        if recomputes:
            vae.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, own=stored: own.append(t.numel()) or t, lambda t: t):
            pixels = decode(vae, x)
        (pixels**2).sum().backward()
        found.append((pixels.detach(), x.grad, sum(stored)))
    (plain, expected, much), (pixels, gradient, little) = found
    assert torch.equal(pixels, plain)
    torch.testing.assert_close(gradient, expected)
    assert little < much / 2
