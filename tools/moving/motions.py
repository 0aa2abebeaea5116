"""What moves, and how: a picture with transparency becomes a clip on white."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOTIONS = ("bouncing", "spinning", "sliding", "pulsing", "shaking")
NUM_FRAMES = 9
SIZE_PX = 64
SCALE = 0.72  # of a resting icon in the frame: what leaves the frame nobody sees


class Poses(NamedTuple):
    """Where an icon is in each frame.

    Attributes:
        right: shift in half widths of the frame, [N, F].
        down: shift in half heights of the frame, [N, F].
        angle: turn in radians, clockwise, [N, F].
        scale: size of the icon in the frame, 1 fills it, [N, F].
    """

    right: Tensor
    down: Tensor
    angle: Tensor
    scale: Tensor


def poses(motions: Tensor, draw: torch.Generator) -> Poses:
    """Poses of clips, each with a direction, phase and strength of its own.

    Args:
        motions: rows of `MOTIONS`, [N]; -1 stands still.
        draw: source of directions, phases and strengths.
    """
    count = len(motions)
    time = torch.arange(NUM_FRAMES).float().expand(count, -1)
    phase = torch.rand(count, 1, generator=draw)
    strength = 0.85 + 0.3 * torch.rand(count, 1, generator=draw)
    side = torch.randint(2, (count, 1), generator=draw) * 2.0 - 1
    still = 0.06 * torch.randn(3, count, 1, generator=draw).clamp(-2, 2)

    def where(name: str, moved: Tensor) -> Tensor:
        return torch.where(motions[:, None] == MOTIONS.index(name), moved, torch.zeros(()))

    round_trip = torch.sin(math.tau * (time / (NUM_FRAMES - 1) + phase))
    hop = torch.sin(math.pi * (time / (NUM_FRAMES - 1) * 2 + phase)).abs()  # two hops in a clip
    quick = torch.sin(math.tau * (time / 4 + phase.mul(4).floor() / 4 + 0.125)) * math.sqrt(2)
    across = (time / (NUM_FRAMES - 1) - 0.5) * side * 0.64
    return Poses(
        right=where("sliding", across * strength) + where("shaking", 0.07 * quick * strength) + still[0],
        down=where("bouncing", (0.24 - 0.5 * hop) * strength) + still[1],
        angle=where("spinning", side * math.tau / 11 * strength * time + math.tau * phase)
        + where("shaking", 0.22 * quick * strength),
        scale=SCALE * (1 + 0.3 * where("pulsing", round_trip * strength)) * (1 + still[2] / 2),
    )


def layers_of(layers: Tensor, where: Poses) -> Tensor:
    """Moved icons with their transparency, [N, F, 4, 64, 64].

    Args:
        layers: colour times alpha, and alpha, [N, 4, 64, 64] in [0, 1].
        where: poses of N icons.
    """
    count, frames = where.right.shape
    cos, sin = where.angle.cos(), where.angle.sin()
    rows = [cos, sin, -(cos * where.right + sin * where.down), -sin, cos, sin * where.right - cos * where.down]
    matrices = (torch.stack(rows, -1) / where.scale[..., None]).view(count * frames, 2, 3)
    # Two samples a side for each pixel: an icon that shrinks would flicker else.
    grid = F.affine_grid(matrices, [count * frames, 4, 2 * SIZE_PX, 2 * SIZE_PX], align_corners=False)
    moved = F.grid_sample(layers.repeat_interleave(frames, 0), grid, align_corners=False)
    return F.avg_pool2d(moved, 2).unflatten(0, (count, frames))


def clips(layers: Tensor, where: Poses) -> Tensor:
    """Clips [N, 3, F, 64, 64] in [0, 1] of icons on white; see `layers_of`."""
    moved = layers_of(layers, where)
    return (moved[:, :, :3] + 1 - moved[:, :, 3:]).transpose(1, 2).clamp(0, 1)
