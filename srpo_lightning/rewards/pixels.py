"""Image preprocessing of reward models as differentiable tensor ops. Images are [B, 3, H, W] in [0, 1]."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Images: TypeAlias = Float[Tensor, "B 3 H W"]
Resized: TypeAlias = Float[Tensor, "B 3 h w"]

# OpenAI CLIP's normalisation, the default of every CLIP checkpoint.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Filter = Literal["bicubic", "bilinear"]

FILTERS: Mapping[int, Filter] = {2: "bilinear", 3: "bicubic"}
"""By the numbers that Pillow and processors' configurations have for them."""

TOLERANCE = 1e-3  # of [0, 1]: what rounding in half precision may leave


class Preprocessing(NamedTuple):
    """How a reward model wants its pixels.

    Args:
        size: Height and width in pixels that the model reads.
        fit: Way to that size: crop the centre of what fits by its shorter side, pad with black what fits by its longer
            side, or squash.
        mean: Mean of each channel, subtracted.
        std: Standard deviation of each channel, divided by.
        half_even: Whether half a pixel of the crop's corner is rounded to even, as torchvision's CenterCrop does.
            Otherwise it is rounded down, as transformers' image processors do.
        resample: Filter of the resizing, with antialiasing.
        clamp: Whether bicubic overshoot is cut off, as resizing 8-bit pictures does; resizing tensors leaves it.
    """

    size: tuple[int, int]
    fit: Literal["crop", "pad", "squash"] = "crop"
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    half_even: bool = False
    clamp: bool = True
    resample: Filter = "bicubic"

    @classmethod
    def from_config(cls, config: dict[str, Any], image_size: int) -> "Preprocessing":
        """Read a transformers' `preprocessor_config.json`; `image_size` where it does not say.

        Raises:
            ValueError: if it resizes by another filter.
        """
        crop = bool(config.get("do_center_crop", True))
        # The processor writes a crop size even where it does not crop.
        size = config.get("crop_size" if crop and "crop_size" in config else "size", image_size)
        if isinstance(size, dict):
            side = size.get("shortest_edge", image_size)
            size = (size.get("height", side), size.get("width", side))
        elif isinstance(size, int):
            size = (size, size)
        mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
        number = config.get("resample", 3)
        if number not in FILTERS:
            known = " or ".join(f"{known} ({name})" for known, name in FILTERS.items())
            raise ValueError(f"preprocessor_config.json has resample {number}, which is not known here: it is {known}")
        return cls(tuple(size), "crop" if crop else "squash", mean, std, resample=FILTERS[number])

    def __call__(self, images: Images) -> Resized:
        """Resize, crop or pad, and normalise; half precision becomes float32.

        Raises:
            ValueError: if the images are not in [0, 1]; NaN passes, and makes the score of its image NaN.
        """
        refuse_out_of_range(images)
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.fit == "crop":
            resized = resize_and_crop(images, self.size, self.half_even, self.clamp, self.resample)
        elif self.fit == "pad":
            resized = resize_and_pad(images, self.size, self.clamp, self.resample)
        else:
            resized = resize(images, self.size, self.clamp, self.resample)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (resized - mean) / std


def refuse_out_of_range(images: Images) -> None:
    """Refuse images in [0, 255] or [-1, 1], naming the range that was seen."""
    low, high = (float(edge) for edge in images.detach().aminmax())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"images span [{low:.3g}, {high:.3g}]: a reward takes them in [0, 1]; divide 8-bit images by 255, and map "
            "[-1, 1] there by (images / 2 + 0.5).clamp(0, 1)"
        )


def resize(images: Images, size: tuple[int, int], clamp: bool = True, resample: Filter = "bicubic") -> Resized:
    """With antialiasing: PIL's filter but for PIL's rounding to 8 bits.

    One axis after the other is resized, and clamped to [0, 1], as PIL does. The width is first, unless the height alone
    shrinks; Pillow before 13 always takes the width first. Where the size is right already the input is returned.
    """
    height, width = images.shape[-2:]
    height_first = size[0] < height and size[1] > width
    for part in ((size[0], width) if height_first else (height, size[1]), size):
        if images.shape[-2:] != torch.Size(part):
            images = _along_an_axis(images, part, resample)
            images = images.clamp(0, 1) if clamp else images
    return images


def _along_an_axis(images: Images, size: tuple[int, int], resample: Filter) -> Resized:
    """By `interpolate`; on CUDA by `products`: there the gradient of `interpolate` is another one in every run."""
    if images.device.type == "cuda":
        return products(images, size, resample)
    return functional.interpolate(images, size=size, mode=resample, antialias=True)


def products(images: Images, size: tuple[int, int], resample: Filter = "bicubic") -> Resized:
    """What `interpolate` computes, as products with its weights, in float64; the gradient is the same in every run."""
    with torch.autocast(images.device.type, enabled=False):
        resized = images.double()
        for axis, target in zip((-2, -1), size, strict=True):
            if target != resized.shape[axis]:
                weights = _weights(resized.shape[axis], target, images.device, resample)
                resized = weights @ resized if axis == -2 else resized @ weights.T
        return resized.to(images.dtype)


@lru_cache(maxsize=64)
def _weights(source: int, target: int, device: torch.device, resample: Filter) -> Float[Tensor, "target source"]:
    """Of resizing along one axis, on the device from then on: copying makes the host wait."""
    with torch.inference_mode(False), torch.no_grad():
        each = torch.eye(source, dtype=torch.float64, device="cpu")[None, None]
        resized = functional.interpolate(each, size=(target, source), mode=resample, antialias=True)
        return resized[0, 0].to(device)


def resize_and_crop(
    images: Images,
    size: tuple[int, int],
    half_even: bool = False,
    clamp: bool = True,
    resample: Filter = "bicubic",
) -> Resized:
    """Resize until `size` just fits inside, then cut out the centre."""
    height, width = images.shape[-2:]
    # In whole numbers: a rounded-off factor would cut a column from 49 x 98 at height 16.
    by_height = size[0] * width >= size[1] * height
    fitting = (size[0], size[0] * width // height) if by_height else (size[1] * height // width, size[1])
    spare = fitting[0] - size[0], fitting[1] - size[1]
    top, left = (round(pixels / 2) if half_even else pixels // 2 for pixels in spare)
    return resize(images, fitting, clamp, resample)[..., top : top + size[0], left : left + size[1]]


def resize_and_pad(images: Images, size: tuple[int, int], clamp: bool = True, resample: Filter = "bicubic") -> Resized:
    """Resize until the picture just fits into `size`, then centre it on black."""
    height, width = images.shape[-2:]
    factor = min(size[0] / height, size[1] / width)
    fitting = max(1, round(height * factor)), max(1, round(width * factor))
    below, right = size[0] - fitting[0], size[1] - fitting[1]
    resized = resize(images, fitting, clamp, resample)
    return functional.pad(resized, (right // 2, right - right // 2, below // 2, below - below // 2))
