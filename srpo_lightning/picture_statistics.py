"""Statistics of pictures and clips that read no text, by name: what hacked rewards move, and may be told to keep.

Shapes: B pictures of H x W pixels, clips of F frames.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

LUMA = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue. Source: ITU-R BT.709."""


def saturation(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Mean HSV saturation of each image in [0, 1]: (max - min) / max over the channels, 0 for black."""
    high, low = images.amax(1), images.amin(1)
    return torch.where(high <= 0, torch.zeros_like(high), (high - low) / high.clamp(min=1e-8)).mean((-2, -1))


def brightness(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Mean luma of each image in [0, 1], of the pixels' values as they are stored."""
    return luma(images).mean((-2, -1))


def high_frequency(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """The share in [0, 1] of the luma's variance that is finer than four pixels: noise, grain, grid patterns.

    Of the power spectrum without the mean, what lies beyond 1/4 cycle per pixel in either direction; 0 for one colour.
    """
    power = torch.fft.fft2(luma(images)).abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[-2:])
    fine = (rows[:, None] > 0.25) | (columns > 0.25)
    power[:, 0, 0] = 0
    total = power.sum((-2, -1))
    return (power * fine).sum((-2, -1)) / total.clamp(min=1e-12)


def motion(clips: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, " B"]:
    """Mean absolute change of a clip's values in [0, 1] from one frame to the next; 0 where it stands still."""
    return clips.diff(dim=2).abs().mean((1, 2, 3, 4))


def change_of_shapes(clips: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, " B"]:
    """Mean absolute change of a clip's values from one frame to the next, apart from each frame's mean colour.

    Light that flickers over the whole picture changes nothing but its mean colour.
    """
    return motion(clips - clips.mean((-2, -1), keepdim=True))


def consistency(features: Float[Tensor, "F B E"]) -> Float[Tensor, " B"]:
    """Mean cosine between the features of neighbouring frames; 1 where all frames are alike."""
    return functional.cosine_similarity(features[1:].float(), features[:-1].float(), dim=-1).mean(0)


def flicker(clips: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, " B"]:
    """Mean absolute difference of a frame's brightness from its neighbours' mean; 0 where light moves evenly."""
    light = torch.stack([brightness(frame) for frame in clips.unbind(2)], dim=1)
    return (light[:, 1:-1] - (light[:, :-2] + light[:, 2:]) / 2).abs().mean(1)


class Statistic(NamedTuple):
    """A number of every evaluation sample, logged by its name.

    Args:
        measure: Numbers [B] of images [B, 3, H, W], or of clips [B, 3, F, H, W], in [0, 1]; the first line of its
            docstring says what they are.
        is_compared: Whether more is better, so that samples win against the base's by it.
    """

    measure: Callable[[Tensor], Tensor]
    is_compared: bool = False

    @property
    def meaning(self) -> str:
        """What the number is, in one line."""
        return (self.measure.__doc__ or "").partition("\n")[0].rstrip(".")


PICTURE_STATISTICS = {
    "saturation": Statistic(saturation),
    "brightness": Statistic(brightness),
    "high_frequency": Statistic(high_frequency),
}
"""What is measured on every evaluation picture, by the name of its column: a function and a line here make one more."""

CLIP_STATISTICS = {"motion": Statistic(motion), "flicker": Statistic(flicker)}
"""What is measured on every clip beside, likewise."""

STATISTICS = PICTURE_STATISTICS | CLIP_STATISTICS


def luma(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B H W"]:
    """Brightness of every pixel, in float32 at least; no product of matrices, which autocast would round."""
    weights = images.new_tensor(LUMA, dtype=torch.promote_types(images.dtype, torch.float32))
    return (images * weights.view(3, 1, 1)).sum(1)


SCORED_FRAMES = 4
"""Frames of a clip at which an evaluation measures what pictures have."""


def evenly(number: int, num_frames: int) -> list[int]:
    """Frames from the first to the last at equal distances, as many or all; one alone is the middle one."""
    number = min(number, num_frames)
    if number == 1:
        return [num_frames // 2]
    return [round(place * (num_frames - 1) / (number - 1)) for place in range(number)]


def mean_over_frames(images: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """What is measured of images [B, 3, H, W]; of clips [B, 3, F, H, W] the mean over all frames."""
    if images.ndim == 4:
        return measure(images)
    return torch.stack([measure(frame) for frame in images.unbind(2)]).mean(0)


def over_frames(images: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """What is measured of images [B, 3, H, W]; of clips [B, 3, F, H, W] the mean over frames at equal distances."""
    if images.ndim == 4:
        return measure(images)
    return torch.stack([measure(images[:, :, frame]) for frame in evenly(SCORED_FRAMES, images.shape[2])]).mean(0)
