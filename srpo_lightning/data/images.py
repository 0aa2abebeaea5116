"""Real pictures and clips: brought to a size of the run, and kept as the latents that the VAE makes of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from srpo_lightning.batch import Size
from srpo_lightning.data.clips import read_clip
from srpo_lightning.data.colours import as_seen
from srpo_lightning.data.picture_files import LIMITS, Limits, read_picture
from srpo_lightning.data.store import ParquetStore, per_file
from srpo_lightning.data.tensor_files import Item, key_of

Pixels = Float[Tensor, "3 *F H W"]
EncodeImages = Callable[[Float[Tensor, "B 3 *F H W"]], Float[Tensor, "B *latent"]]
LATENT_BYTES_PER_PIXEL = 64 * 4 / 256  # 64 float32 numbers for 16 x 16 pixels


class Picture(NamedTuple):
    """A picture or a clip at a size.

    Args:
        image: its path, or its place in a .tar.
        size: height and width to bring it to.
        limits: up to where it is read.
        num_frames: of the clip, its first ones; 1: it is a picture.
    """

    image: str
    size: Size
    limits: Limits = LIMITS
    num_frames: int = 1

    @property
    def latent_bytes(self) -> int:
        """Of its latents, at most."""
        return int(self.size[0] * self.size[1] * self.num_frames * LATENT_BYTES_PER_PIXEL)


class LatentCache(ParquetStore):
    """The latents of pictures, by their bytes and their size.

    Args:
        folder: of the caches of all encoders, here or on s3://, gs:// or hf://.
        description: of the encoder, with its `fingerprint`.
        mirror: See `ParquetStore`.
        mirror_gigabytes: See `ParquetStore`.
    """

    def missing(self, pictures: Sequence[Picture]) -> list[Picture]:
        """The pictures whose latents are not there."""
        rows = self.find([latent_key(picture) for picture in pictures])
        return [picture for picture, row in zip(pictures, rows, strict=True) if row < 0]

    def add(self, pictures: Sequence[Picture], encode: EncodeImages, batch_size: int) -> int:
        """Compute what is missing; returns how many pictures that were."""
        count = 0
        for size in dict.fromkeys(picture.size for picture in pictures):
            wanted = [(latent_key(picture), picture) for picture in pictures if picture.size == size]
            items_per_file = per_file(wanted[0][1].latent_bytes)
            count += self.fill(wanted, lambda batch: encoded(batch, encode), batch_size, items_per_file)
        return count

    def latents(self, row: int) -> Tensor:
        """The latents in a row, float32 [*latent]."""
        return self.read(row)["x0"]


def encoded(pictures: Sequence[Any], encode: EncodeImages) -> list[Item]:
    """The latents of pictures of one size, as they are stored."""
    latents = encode(torch.stack([load_picture(picture) for picture in pictures]))
    return [{"x0": own.clone()} for own in latents.float().cpu()]


def at_once(pictures: Sequence[Picture], batch_size: int) -> int:
    """How many are encoded together: clips one after the other, for each is as much as many pictures."""
    return 1 if any(picture.num_frames > 1 for picture in pictures) else batch_size


def latent_key(picture: Picture) -> str:
    """A function of the picture's bytes and size: a file that is written anew is encoded anew."""
    clip = f" {picture.num_frames} frames" if picture.num_frames > 1 else ""
    return key_of(read_picture(picture.image, picture.limits), "{} {}".format(*picture.size) + clip)


def load_picture(picture: Picture) -> Pixels:
    """A picture in [0, 1], [3, H, W], or a clip, [3, F, H, W], as a viewer shows it, scaled and cropped to its size.

    Raises:
        ValueError: naming the file and the cure, if it is no picture or clip, or is not shown in one way.
    """
    if picture.num_frames == 1:
        return _fitted(as_seen(picture.image, picture.limits), picture.size)
    frames = read_clip(picture.image, picture.num_frames, picture.limits)
    return torch.stack([_fitted(frame, picture.size) for frame in frames], dim=1)


def _fitted(shown: Image.Image, size: Size) -> Float[Tensor, "3 H W"]:
    height, width = size
    fitted = ImageOps.fit(shown, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Of some sizes the one whose aspect ratio is nearest, so that the least is cropped; of equal ones the first."""
    ratio = size[0] / size[1]
    return min(sizes, key=lambda own: abs(np.log(own[0] / own[1] / ratio)))
