"""Pictures as the reward and the judge train on them and are tested on: moved, on other grounds, imperfect."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """How far pictures are changed. Probabilities in [0, 1].

    Attributes:
        shift_px: largest shift along either axis.
        smallest: lower end of the zoom; the upper end is 1.1.
        tilt: largest rotation in radians.
        grounded: how often the white background is replaced by a light gradient.
        blurred: how often detail is lost by scaling down and up again, as in a poor generated picture.
        noise: largest standard deviation of pixel noise.
        tint: largest relative change of each colour channel.
        mirrored: how often left and right are swapped.
    """

    shift_px: float = 6
    smallest: float = 0.75
    tilt: float = 0.15
    grounded: float = 0.5
    blurred: float = 0.5
    noise: float = 0.06
    tint: float = 0.1
    mirrored: float = 0.5


# What `evaluate` measures with: fresh shifts, scales and backgrounds, but crisp pictures.
TEST = Augmentation(shift_px=5, smallest=0.8, tilt=0.0, blurred=0.0, noise=0.02, tint=0.0)


def uniform(draw: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """`count` numbers in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=draw)


def chance(draw: torch.Generator, count: int, probability: float) -> Tensor:
    """`count` booleans that are true with `probability`."""
    return torch.rand(count, generator=draw) < probability


def moved(layers: Tensor, settings: Augmentation, draw: torch.Generator) -> Tensor:
    """Shift, zoom, tilt and mirror pictures [B, 4, H, W]; what comes in from outside is transparent."""
    count, size = layers.shape[0], layers.shape[-1]
    angle = uniform(draw, count, -settings.tilt, settings.tilt)
    zoom = uniform(draw, count, math.log(settings.smallest), math.log(1.1)).exp()
    flip = 1 - 2 * chance(draw, count, settings.mirrored).float()
    shift = 2 * settings.shift_px / size
    right, down = uniform(draw, count, -shift, shift), uniform(draw, count, -shift, shift)
    rows = [angle.cos() * flip / zoom, -angle.sin() / zoom, right, angle.sin() * flip / zoom, angle.cos() / zoom, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, align_corners=False)


def grounds(count: int, size: int, settings: Augmentation, draw: torch.Generator) -> Tensor:
    """Backgrounds [B, 3, H, W]: white, or a light gradient between two colours (dark ones would hide the ink)."""
    top, bottom = (uniform(draw, count * 3, 0.6, 1.0).view(count, 3, 1, 1) for _ in range(2))
    height = torch.linspace(0, 1, size).view(1, 1, size, 1)
    coloured = (top + (bottom - top) * height).expand(count, 3, size, size)
    return torch.where(chance(draw, count, settings.grounded).view(count, 1, 1, 1), coloured, torch.ones(()))


def blurred(images: Tensor, settings: Augmentation, draw: torch.Generator) -> Tensor:
    """Scale some of the images down, all of them to one size drawn in 20..48 pixels, and up again."""
    size = images.shape[-1]
    small = int(torch.randint(20, 49, (), generator=draw))
    soft = F.interpolate(images, (small, small), mode="bilinear", antialias=True)
    soft = F.interpolate(soft, (size, size), mode="bicubic")
    return torch.where(chance(draw, len(images), settings.blurred).view(-1, 1, 1, 1), soft, images)


def augment(layers: Tensor, settings: Augmentation, draw: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] out of pictures [B, 4, H, W] as `World.layers` holds them."""
    count, size = layers.shape[0], layers.shape[-1]
    layers = moved(layers, settings, draw)
    images = layers[:, :3] + (1 - layers[:, 3:]) * grounds(count, size, settings, draw)
    images = images * uniform(draw, count * 3, 1 - settings.tint, 1 + settings.tint).view(count, 3, 1, 1)
    if settings.blurred:
        images = blurred(images, settings, draw)
    noise = torch.randn(images.shape, generator=draw) * uniform(draw, count, 0, settings.noise).view(-1, 1, 1, 1)
    return (images + noise).clamp(0, 1)
