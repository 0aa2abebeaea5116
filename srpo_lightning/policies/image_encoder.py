"""Real pictures to latents, through the encoder of a policy's VAE."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from srpo_lightning.draws import keyed_generator
from srpo_lightning.files.pretrained import part
from srpo_lightning.training.devices import check_device

READING = 3
"""Raised whenever the same file comes to other pixels (data/colours.py), so that no latents of before are taken."""


class VAEEncoder:
    """The encoder of a pipeline folder's VAE; its weights are read on first use.

    Args:
        pretrained: folder in the layout of a diffusers pipeline, or a hub id.
        read: reads the VAE, in a dtype.
        from_vae: turns the VAE's latents [B, c, h, w] into the policy's.
        dtype: numbers in which the VAE computes.
        device: where it runs.
        draw: whether latents are a sample of the VAE's posterior, by noise that depends on the picture alone; false:
            its mode.
    """

    def __init__(
        self,
        pretrained: str,
        read: Callable[[torch.dtype], Any],
        from_vae: Callable[[Any, Tensor], Tensor],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        draw: bool = False,
    ) -> None:
        self.pretrained, self.read, self.from_vae = pretrained, read, from_vae
        self.dtype, self.device, self.draw = dtype, device, draw
        self._vae: Any = None

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 *F H W"]) -> Float[Tensor, "B *latent"]:
        """Pictures or clips in [0, 1] to clean latents, float32 on the CPU; the same one always has the same."""
        if self._vae is None:
            check_device("data.text_device", self.device)
            self._vae = self.read(self.dtype).eval().requires_grad_(False).to(self.device)
        pixels = (images * 2 - 1).to(self.device, self.dtype)
        posterior = self._vae.encode(pixels).latent_dist
        z: Tensor = posterior.mode()
        if self.draw:
            keys = [hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).hexdigest() for image in images]
            noise = [torch.randn(z.shape[1:], generator=keyed_generator("posterior", key)) for key in keys]
            z = z + posterior.std * torch.stack(noise).to(z)
        return self.from_vae(self._vae, z.float()).cpu()

    def description(self) -> dict[str, str | int]:
        """What latents depend on, for people to read, and a `fingerprint` of all of it, files included."""
        file = Path(part(self.pretrained, "vae", "config.json"))
        is_local = Path(self.pretrained).expanduser().is_dir()
        rule = f"{self.dtype} latents {READING}{' drawn' if self.draw else ''}"
        digest = hashlib.sha256(rule.encode())
        for own in sorted(filter(Path.is_file, file.parent.glob("*"))) if is_local else []:
            digest.update(f"{own.name} {own.stat().st_size}".encode() + own.read_bytes())
        name = Path(self.pretrained).name if is_local else self.pretrained
        revision = "local" if is_local else file.parent.parent.name
        digest.update(f"{'' if is_local else name} {revision}".encode())
        return {
            "model": name,
            "revision": revision,
            "part": "vae",
            "dtype": str(self.dtype).removeprefix("torch."),
            "latents": "sample" if self.draw else "mode",
            "fingerprint": digest.hexdigest(),
        }

    def unload(self) -> None:
        """Free the weights; `encode` reads them again."""
        self._vae = None
