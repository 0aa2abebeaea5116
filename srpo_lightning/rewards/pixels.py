"""Image preprocessing of reward models as differentiable tensor ops. Images are [B, 3, H, W] in [0, 1]."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Images: TypeAlias = Float[Tensor, "B 3 H W"]
Resized: TypeAlias = Float[Tensor, "B 3 h w"]

# OpenAI CLIP's normalisation, the default of every CLIP checkpoint.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocessing(NamedTuple):
    """How a reward model wants its pixels.

    Args:
        size: (height, width) in pixels that the model reads.
        keep_aspect: resize the shorter side to fit and crop the centre; otherwise squash to `size`.
        mean: per channel.
        std: per channel.
    """

    size: tuple[int, int]
    keep_aspect: bool = True
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    @classmethod
    def from_config(cls, config: dict[str, Any], image_size: int) -> "Preprocessing":
        """Read a transformers' `preprocessor_config.json`; `image_size` where it does not say."""
        crop = bool(config.get("do_center_crop", True))
        # The processor writes a crop size even where it does not crop.
        size = config.get("crop_size" if crop and "crop_size" in config else "size", image_size)
        if isinstance(size, dict):
            side = size.get("shortest_edge", image_size)
            size = (size.get("height", side), size.get("width", side))
        elif isinstance(size, int):
            size = (size, size)
        mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
        return cls(tuple(size), crop, mean, std)

    def __call__(self, images: Images) -> Resized:
        """Resize, crop and normalise."""
        resized = resize_and_crop(images, self.size) if self.keep_aspect else resize(images, self.size)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (resized - mean) / std


def resize(images: Images, size: tuple[int, int]) -> Resized:
    """Bicubic with antialiasing, clamped to [0, 1]: PIL's BICUBIC but for PIL's rounding to 8 bits.

    No work and exactly the input where the size is right already.
    """
    if images.shape[-2:] == torch.Size(size):
        return images
    return functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def resize_and_crop(images: Images, size: tuple[int, int]) -> Resized:
    """Resize until `size` just fits inside, then cut out the centre."""
    height, width = images.shape[-2:]
    # In whole numbers: a rounded-off factor would cut a column from 49 x 98 at height 16.
    by_height = size[0] * width >= size[1] * height
    fitting = (size[0], size[0] * width // height) if by_height else (size[1] * height // width, size[1])
    resized = resize(images, fitting)
    top, left = (resized.shape[-2] - size[0]) // 2, (resized.shape[-1] - size[1]) // 2
    return resized[..., top : top + size[0], left : left + size[1]]
