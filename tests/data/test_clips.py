"""Clips from animated pictures and from arrays: their frames, and what is refused by name."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from srpo_lightning.data.clips import clip_size, read_clip
from srpo_lightning.data.images import Picture, at_once, latent_key, load_picture
from srpo_lightning.data.picture_files import Limits
from srpo_lightning.data.prompts import Prompt, read_prompts

LEVELS = (0, 60, 120, 180, 240)


def frames(height: int = 16, width: int = 24) -> list[Image.Image]:
    """Each of one grey."""
    return [Image.new("RGB", (width, height), (level,) * 3) for level in LEVELS]


def array(count: int = 5) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames()])[:count]


def write(path, **settings) -> str:
    """The clip as a file of the kind that its name says."""
    kind = path.suffix
    if kind == ".npy":
        np.save(path, array())
    elif kind == ".npz":
        np.savez_compressed(path, frames=array(), fps=np.array(16))
    else:
        first, *rest = frames()
        first.save(path, save_all=True, append_images=rest, duration=100, **settings)
    return str(path)


KINDS = {"a.webp": {"lossless": True}, "a.png": {}, "a.gif": {}, "a.npy": {}, "a.npz": {}, "a.avif": {"quality": 100}}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_read_in_their_order_scaled_and_cropped(tmp_path, name):
    path = write(tmp_path / name, **KINDS[name])
    assert clip_size(path, 5) == (16, 24)
    clip = load_picture(Picture(path, (8, 8), num_frames=5))
    assert clip.shape == (3, 5, 8, 8)
    levels = clip.mean((0, 2, 3)) * 255
    torch.testing.assert_close(levels, torch.tensor(LEVELS).float(), atol=3 if name == "a.avif" else 0.01, rtol=0)
    assert len(read_clip(path, 3)) == 3


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_of_too_few_frames_is_refused_by_name(tmp_path, name):
    path = write(tmp_path / name, **KINDS[name])
    for read in (read_clip, clip_size):
        with pytest.raises(ValueError, match=rf"{name} has 5 frames, fewer than the 9 of the policy's num_frames"):
            read(path, 9)


def test_a_picture_is_no_clip_and_a_clip_no_picture(tmp_path):
    frames()[0].save(tmp_path / "still.png")
    with pytest.raises(ValueError, match=r"still.png has 1 frame, fewer than the 5 of the policy's num_frames"):
        clip_size(str(tmp_path / "still.png"), 5)
    with pytest.raises(ValueError, match=r"a.webp is an animation"):
        load_picture(Picture(write(tmp_path / "a.webp"), (8, 8)))


def damaged(name: str) -> bytes:
    stream = io.BytesIO()
    whole = array()
    if name == "pickled":
        np.save(stream, np.array([{}, {}], dtype=object), allow_pickle=True)
    elif name == "floats":
        np.save(stream, whole / 255)
    elif name == "channels first":
        np.save(stream, whole.transpose(0, 3, 1, 2))
    elif name == "cut off":
        np.save(stream, whole)
        return stream.getvalue()[:-100]
    elif name == "endless":  # says more than there is
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**4, 10**4, 3)}
        )
    elif name == "two arrays":
        np.savez(stream, a=whole, b=whole)
    elif name == "bomb":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("frames.npy", bytes(3 * 10**6))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("pickled", "expected uint8"),
        ("floats", r"it is float64 \[5, 16, 24, 3\], expected uint8 \[frames, height, width, 3\]"),
        ("channels first", "expected uint8"),
        ("cut off", "it ends after"),
        ("endless", "it ends after 0 of"),
        ("two arrays", "a, b, none is `frames`"),
        ("bomb", "unpacks to 3 MB, more than data.max_picture_megabytes"),
        ("empty", "EOF"),
    ],
)
def test_arrays_that_are_no_clip_are_refused_by_name(tmp_path, name, cure):
    path = tmp_path / "a.npy"
    path.write_bytes(damaged(name))
    with pytest.raises(ValueError, match=rf"picture .*a.npy cannot be read \(.*{cure}.*\): replace it or leave it out"):
        read_clip(str(path), 5, Limits(megabytes=1))


def test_an_array_of_too_many_pixels_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 1000, 1001, 3), np.uint8))
    with pytest.raises(ValueError, match=r"has 1001 x 1000 pixels, more than data.max_picture_megapixels"):
        clip_size(str(tmp_path / "a.npy"), 2, Limits(megapixels=1))


def test_an_array_in_the_order_of_fortran_is_the_same_clip(tmp_path):
    varied = np.arange(5 * 16 * 24 * 3, dtype=np.uint8).reshape(5, 16, 24, 3)
    for name, own in (("c.npy", varied), ("f.npy", np.asfortranarray(varied))):
        np.save(tmp_path / name, own)
    first, second = (read_clip(str(tmp_path / name), 5) for name in ("c.npy", "f.npy"))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True))


def test_latents_are_kept_by_the_number_of_frames_and_clips_encoded_one_by_one(tmp_path):
    path = write(tmp_path / "a.npy")
    keys = {latent_key(Picture(path, (8, 8), num_frames=frames)) for frames in (2, 5)}
    assert len(keys) == 2
    assert at_once([Picture(path, (8, 8), num_frames=5)], 16) == 1
    assert at_once([Picture(path, (8, 8))], 16) == 16


def test_arrays_count_where_they_have_captions_and_no_picture_of_their_name(tmp_path):
    for name in ("a.npy", "b.webp", "b.npz", "stray.npz"):
        write(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"clip {name}")
    found = list(read_prompts(str(tmp_path)))
    assert found == [Prompt(f"clip {own[0]}", str((tmp_path / own).resolve())) for own in ("a.npy", "b.webp")]
    (tmp_path / "b.webp").unlink()
    with pytest.raises(ValueError, match=r"stray.npz and 0 other pictures have no caption"):
        read_prompts(str(tmp_path))
