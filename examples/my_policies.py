"""A policy of one's own: what draws pictures, and how it is trained."""

import torch
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Size
from srpo_lightning.encoding import Encoder, Encoding
from srpo_lightning.policies.base import Policy, Shard
from srpo_lightning.policies.flux import FluxTextEncoder


class PixelFlow(Policy):
    """Pictures of 8 x 8 pixels by one convolution.

    Args:
        pretrained: pipeline folder whose text encoders turn prompts into features.
    """

    fingerprint = "PixelFlow"  # of the architecture, kept in checkpoints

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        self.pretrained = pretrained

    def encoder(self, wanted: Encoding) -> Encoder:
        """How prompts are encoded; no real pictures are trained on."""
        return Encoder(FluxTextEncoder.of(self.pretrained, wanted), None, size=(8, 8), cell=8)

    def load(self, shard: Shard | None = None) -> None:
        """Where weights are read, once."""
        if not hasattr(self, "net"):
            self.net = torch.nn.Conv2d(4, 3, 3, padding=1)
            self.first = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def restart(self) -> None:
        """As it was before training."""
        self.net.load_state_dict(self.first)

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """Of one sample."""
        return 3, 8, 8

    def forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """The velocity, noise - x0."""
        level = sigma.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        return self.net(torch.cat([x, level], dim=1))

    def decode(self, latents: Tensor, size: Size | None = None) -> Tensor:
        """To pictures in [0, 1]."""
        return latents.sigmoid()

    def sigmas(self, num_steps: int, shift: float | None = None, size: Size | None = None) -> Tensor:
        """The noise levels of an Euler sampler, from 1 to 0."""
        return flow.schedule(num_steps, shift or 1.0)
