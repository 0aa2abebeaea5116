"""A picture file as a viewer shows it: upright, in sRGB, on white; what cannot be shown so is refused by name."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from srpo_lightning.batch import Size
from srpo_lightning.data.picture_files import LIMITS, MEGA, Limits, read_picture

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "TGA")
"""What Pillow may take content for, whatever the file is called; it would run another program for others."""

ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")
"""Of these those that may be clips."""

WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", *WIDE)
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
MISREAD = ((0, 1), (0, 2), (0, 4), (2, 16))
"""Kinds of colours of a PNG (0: grey, 2: RGB) and their bits, of which Pillow compares the transparent one unscaled."""
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
SRGB_GAMMA = 1 / 2.2
NEAR = 0.01
ORIENTATION, BITS, PHOTOMETRIC, WHITE_IS_ZERO = 0x0112, 258, 262, 0
ON_SIDE = 5  # orientations from here on exchange width and height


def as_seen(reference: str, limits: Limits = LIMITS) -> Image.Image:
    """A picture in RGB as a viewer shows it.

    Args:
        reference: a file, or a part of an archive.
        limits: up to where it is read.

    Raises:
        ValueError: naming the file and the cure, if it is no picture, damaged, too large, or of another kind.
    """
    return _looked_at(reference, limits, _on_white)


def frames_as_seen(reference: str, num_frames: int, limits: Limits = LIMITS) -> list[Image.Image]:
    """The first frames of an animation in RGB as a viewer shows them, however long each is shown.

    Raises:
        ValueError: see `as_seen`; also if it has fewer frames.
    """

    def first(opened: Image.Image) -> list[Image.Image]:
        found = []
        for number in range(num_frames):
            opened.seek(number)
            frame = opened.copy()
            frame.format = opened.format
            found.append(_on_white(frame))
        return found

    return _looked_at(reference, limits, first, num_frames)


def size_as_seen(reference: str, limits: Limits = LIMITS, num_frames: int = 1) -> Size:
    """Height and width of a picture as it is seen, or of an animation of so many frames.

    Raises:
        ValueError: see `as_seen`.
    """

    def upright(opened: Image.Image) -> Size:
        width, height = opened.size
        turned = opened.format != "TIFF" and opened.getexif().get(ORIENTATION, 1) >= ON_SIDE  # of a TIFF Pillow does it
        return (width, height) if turned else (height, width)

    return _looked_at(reference, limits, upright, num_frames)


def _looked_at(reference: str, limits: Limits, look: Callable[[Image.Image], T], num_frames: int = 1) -> T:
    content = read_picture(reference, limits)
    try:
        with _of_any_size(), Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            unfit = _unfit(opened, content, limits) or _unfit_frames(opened, num_frames)
            if unfit is None:
                return look(opened)
    except UnidentifiedImageError as error:
        told = f"it begins like none of {', '.join(FORMATS)}"
        raise ValueError(f"picture {reference} cannot be read ({told}): replace it or leave it out") from error
    except Exception as error:  # of damaged files Pillow raises nearly anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"picture {reference} cannot be read ({told}): replace it or leave it out") from error
    raise ValueError(f"picture {reference} {unfit}")


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Without Pillow's own limit, for which there is ours, and without its warnings of what viewers pass over too."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _unfit(opened: Image.Image, content: bytes, limits: Limits) -> str | None:
    """Why a picture is not what a viewer shows, once it is decoded."""
    width, height = opened.size
    if width * height > limits.megapixels * MEGA:
        return (
            f"has {width} x {height} pixels, more than {limits.group}max_picture_megapixels ({limits.megapixels}): "
            "raise that, or make it smaller"
        )
    if opened.mode not in MODES and not _is_wide(opened):
        return f"has pixels that are shown in no one way (Pillow's mode {opened.mode}): save it in sRGB, 8 or 16 bits"
    if "transparency" in opened.info and opened.format == "PNG" and (content[25], content[24]) in MISREAD:
        return (
            f"has one colour that is transparent, in {content[24]} bits, which is not read rightly: save it with an "
            "alpha channel, or in 8 bits"
        )
    primaries = opened.info.get("chromaticity", SRGB_PRIMARIES)
    is_told = "icc_profile" in opened.info or "srgb" in opened.info
    if not is_told and any(abs(a - b) > NEAR for a, b in zip(primaries, SRGB_PRIMARIES, strict=True)):
        return "says its colours by primaries (cHRM) alone: save it with a colour profile, or in sRGB"
    if not is_told and not _are_codes_of_srgb(content, str(opened.format)):
        return "says its colours by codes (cICP or nclx) of another space than sRGB: save it in sRGB"
    return None


def _unfit_frames(opened: Image.Image, num_frames: int) -> str | None:
    """Why it is no picture, or no clip of so many frames."""
    if num_frames > 1:
        frames = getattr(opened, "n_frames", 1) if opened.format in ANIMATED else 1
        return too_few(frames, num_frames) if frames < num_frames else None
    if getattr(opened, "is_animated", False) and opened.format != "MPO":  # whose others are previews and depths
        return "is an animation, or has several pages: save the one that is meant as .png"
    return None


def too_few(frames: int, wanted: int) -> str:
    """Why so many frames are no clip."""
    return (
        f"has {frames} frame{'s' if frames > 1 else ''}, fewer than the {wanted} of the policy's num_frames: give a "
        "longer clip, leave it out, or lower num_frames"
    )


def _are_codes_of_srgb(content: bytes, kind: str) -> bool:
    """Whether primaries and curve are those of BT.709 or sRGB, unspecified, or not told."""
    mark, width = {"PNG": (b"cICP", 1), "AVIF": (b"colrnclx", 2)}.get(kind, (b"", 0))
    place = content.find(mark, 0, 1 << 16) + len(mark)
    if not mark or place < len(mark):
        return True
    primaries, curve = (int.from_bytes(content[place + i * width :][:width], "big") for i in (0, 1))
    return primaries in (1, 2) and curve in (1, 2, 6, 13)


def _is_wide(opened: Image.Image) -> bool:
    return opened.mode in WIDE or (opened.mode == "I" and opened.format == "PNG")


def _on_white(opened: Image.Image) -> Image.Image:
    """Colours first, then transparency, as viewers do it."""
    ImageOps.exif_transpose(opened, in_place=True)
    profile, gamma = opened.info.get("icc_profile"), opened.info.get("gamma", SRGB_GAMMA)
    is_told = profile or "srgb" in opened.info
    whole = _wide(opened) if _is_wide(opened) else opened
    whole = _with_plain_alpha(whole)
    alpha = whole.getchannel("A") if whole.mode in ("LA", "RGBA") else None
    colour = whole.convert(whole.mode.rstrip("A")) if alpha else whole
    colour = _in_srgb(colour, profile)
    if not is_told and abs(gamma / SRGB_GAMMA - 1) > NEAR:
        colour = colour.point([round(255 * (level / 255) ** (SRGB_GAMMA / gamma)) for level in range(256)] * 3)
    if alpha is None:
        return colour
    return Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)


def _wide(opened: Image.Image) -> Image.Image:
    """Grey of 16 bits in 8; Pillow's own conversion cuts all that is brighter than 255 of 65535."""
    levels = np.asarray(opened).astype(np.uint16)
    tags: dict[int, Sequence[int] | int] = getattr(opened, "tag_v2", {})
    most = 2 ** np.ravel(tags.get(BITS, 16))[0] - 1
    grey = np.rint(levels / (most / 255)).astype(np.uint8)
    if opened.format == "TIFF" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    shown = Image.fromarray(grey)
    if (transparent := opened.info.get("transparency")) is not None:
        shown.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    shown.info = {name: value for name, value in opened.info.items() if name != "transparency"}
    return shown


def _with_plain_alpha(whole: Image.Image) -> Image.Image:
    """In a mode of which what remains without its A is the colour."""
    if whole.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in whole.info:
        return whole
    if whole.mode in ("1", "L", "La"):
        return whole.convert("LA" if whole.has_transparency_data else "L")
    return whole.convert("RGBA" if whole.has_transparency_data else "RGB")


def _in_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """By the profile, if it is of such colours; viewers pass over one that is not, or is damaged."""
    own = _profile(profile) if profile else None
    if own is None:
        return colour.convert("RGB")
    space = own.profile.xcolor_space.strip()
    if colour.mode == "L" and space == "RGB":
        colour = colour.convert("RGB")
    if SPACES[colour.mode] != space:
        return colour.convert("RGB")
    try:
        shown = ImageCms.profileToProfile(
            colour, own, _srgb(), renderingIntent=ImageCms.Intent(ImageCms.getDefaultIntent(own)), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, ValueError):
        return colour.convert("RGB")
    assert shown is not None
    return shown


def _profile(content: bytes) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(content))
    except OSError:
        return None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
