"""Real pictures: brought to a size of the run, and kept as the latents that the VAE makes of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from srpo_lightning.batch import Size
from srpo_lightning.data.colours import as_seen
from srpo_lightning.data.picture_files import LIMITS, Limits, read_picture
from srpo_lightning.data.store import ParquetStore, per_file
from srpo_lightning.data.tensor_files import Item, key_of

Pixels = Float[Tensor, "3 H W"]
EncodeImages = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B L C"]]
LATENT_BYTES_PER_PIXEL = 64 * 4 / 256  # 64 float32 numbers for 16 x 16 pixels


class Picture(NamedTuple):
    """A picture at a size.

    Args:
        image: its path, or its place in a .tar.
        size: height and width to bring it to.
        limits: up to where it is read.
    """

    image: str
    size: Size
    limits: Limits = LIMITS


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
            items_per_file = per_file(int(size[0] * size[1] * LATENT_BYTES_PER_PIXEL))
            count += self.fill(wanted, lambda batch: encoded(batch, encode), batch_size, items_per_file)
        return count

    def latents(self, row: int) -> Tensor:
        """The latents in a row, float32 [L, C]."""
        return self.read(row)["x0"]


def encoded(pictures: Sequence[Any], encode: EncodeImages) -> list[Item]:
    """The latents of pictures of one size, as they are stored."""
    latents = encode(torch.stack([load_picture(picture) for picture in pictures]))
    return [{"x0": own.clone()} for own in latents.float().cpu()]


def latent_key(picture: Picture) -> str:
    """A function of the picture's bytes and size: a file that is written anew is encoded anew."""
    return key_of(read_picture(picture.image, picture.limits), "{} {}".format(*picture.size))


def load_picture(picture: Picture) -> Pixels:
    """A picture in [0, 1], [3, H, W], as a viewer shows it, scaled and cropped to its size.

    Raises:
        ValueError: naming the file and the cure, if it is no picture, or one that is not shown in one way.
    """
    height, width = picture.size
    fitted = ImageOps.fit(as_seen(picture.image, picture.limits), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Of some sizes the one whose aspect ratio is nearest, so that the least is cropped; of equal ones the first."""
    ratio = size[0] / size[1]
    return min(sizes, key=lambda own: abs(np.log(own[0] / own[1] / ratio)))
