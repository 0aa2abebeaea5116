"""Clips from animated pictures, and from arrays of frames in .npy and .npz files; no array is unpickled."""

import io
import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from srpo_lightning.batch import Size
from srpo_lightning.data.colours import frames_as_seen, size_as_seen, too_few
from srpo_lightning.data.picture_files import ARRAYS, LIMITS, MEGA, Limits, read_picture

FRAMES = "frames.npy"
"""The array of several in an .npz file that holds the frames."""


def read_clip(reference: str, num_frames: int, limits: Limits = LIMITS) -> list[Image.Image]:
    """The first frames of a clip in RGB, as a viewer shows them.

    Args:
        reference: animated picture, or an array uint8 [frames, height, width, 3].
        num_frames: how many.
        limits: up to where it is read.

    Raises:
        ValueError: naming the file and the cure, if it is none of both, damaged, too large, or has fewer frames.
    """
    if is_array(reference):
        return [Image.fromarray(frame) for frame in read_array(reference, num_frames, limits)[:num_frames]]
    return frames_as_seen(reference, num_frames, limits)


def clip_size(reference: str, num_frames: int, limits: Limits = LIMITS) -> Size:
    """Height and width of a clip.

    Raises:
        ValueError: see `read_clip`.
    """
    if is_array(reference):
        return read_array(reference, num_frames, limits).shape[1:3]
    return size_as_seen(reference, limits, num_frames)


def is_array(reference: str) -> bool:
    """Whether a clip is a file of numbers."""
    return Path(reference).suffix.lower() in ARRAYS


def read_array(reference: str, num_frames: int, limits: Limits) -> np.ndarray:
    """The frames of an array's file, uint8 [frames, height, width, 3].

    Raises:
        ValueError: see `read_clip`.
    """
    content = read_picture(reference, limits)
    try:
        found = _array(_unpacked(content, limits) if content.startswith(b"PK") else content)
    except Exception as error:  # of damaged files zipfile and numpy raise nearly anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"picture {reference} cannot be read ({told}): replace it or leave it out") from error
    _, height, width, _ = found.shape
    if height * width > limits.megapixels * MEGA:
        raise ValueError(
            f"picture {reference} has {width} x {height} pixels, more than {limits.group}max_picture_megapixels "
            f"({limits.megapixels}): raise that, or make it smaller"
        )
    if len(found) < num_frames:
        raise ValueError(f"picture {reference} {too_few(len(found), num_frames)}")
    return found


def _unpacked(content: bytes, limits: Limits) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        arrays = archive.infolist()
        chosen = arrays if len(arrays) == 1 else [own for own in arrays if own.filename == FRAMES]
        if not chosen:
            named = ", ".join(own.filename.removesuffix(".npy") for own in arrays) or "none"
            raise ValueError(f"of its arrays, {named}, none is `frames`")
        if chosen[0].file_size > limits.megabytes * MEGA:
            raise ValueError(
                f"it unpacks to {chosen[0].file_size / MEGA:.0f} MB, more than {limits.group}max_picture_megabytes "
                f"({limits.megabytes})"
            )
        return archive.read(chosen[0])


def _array(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    shape, is_fortran, dtype = read(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"it is {dtype} {list(shape)}, expected uint8 [frames, height, width, 3]")
    if len(content) - stream.tell() < math.prod(shape):
        raise ValueError(f"it ends after {len(content) - stream.tell()} of {math.prod(shape)} bytes")
    numbers = np.frombuffer(content, np.uint8, math.prod(shape), stream.tell())
    return np.ascontiguousarray(numbers.reshape(shape, order="F" if is_fortran else "C"))
