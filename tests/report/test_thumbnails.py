"""Thumbnails are bounded, whatever a picture holds; steps are thinned so that those of a page before mostly stay."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from srpo_lightning.evaluation.pictures import FRAME_MS, as_clip, clip_if_whole, write_clip, write_picture
from srpo_lightning.report.thumbnails import (
    MAX_BYTES,
    MAX_CLIP_BYTES,
    MAX_FRAMES,
    SIDE_PX,
    Thumbnails,
    data_uri,
    moving_uri,
    thinned,
)


def opened(uri: str) -> tuple[bytes, Image.Image]:
    content = base64.b64decode(uri.partition(",")[2])
    return content, Image.open(io.BytesIO(content))


@pytest.mark.parametrize("webp", [True, False])
def test_noise_is_made_small_enough(monkeypatch, webp):
    monkeypatch.setattr("srpo_lightning.report.thumbnails.features.check", lambda name: webp)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 700, 3), dtype=np.uint8)
    content, picture = opened(data_uri(Image.fromarray(noise)))
    assert picture.format == ("WEBP" if webp else "JPEG")
    assert len(content) <= MAX_BYTES
    assert max(picture.size) <= SIDE_PX


def test_small_pictures_keep_their_size():
    assert opened(data_uri(Image.new("RGB", (64, 48), "red")))[1].size == (64, 48)


def greys(count: int, side: int = 32) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), (255 * i // max(count - 1, 1),) * 3) for i in range(count)]


def test_a_clip_of_noise_is_made_small_enough_and_takes_its_time():
    noise = np.random.default_rng(0).integers(0, 256, (2 * MAX_FRAMES, 400, 300, 3), dtype=np.uint8)
    content, clip = opened(moving_uri([Image.fromarray(frame) for frame in noise]))
    assert len(content) <= MAX_CLIP_BYTES
    assert (clip.format, clip.n_frames) == ("WEBP", MAX_FRAMES)
    assert max(clip.size) <= SIDE_PX
    clip.load()
    assert clip.info["duration"] == 2 * FRAME_MS


def test_a_clip_is_shown_moving_in_the_place_of_its_strip(tmp_path):
    strip = tmp_path / "00000.png"
    write_picture(strip, greys(1)[0], {"prompt": "a cat"})
    assert opened(Thumbnails().url(strip))[1].is_animated is False
    frames = greys(5)
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(3, 0, 1, 2) / 255
    write_clip(strip.with_suffix(".webp"), as_clip(pixels))
    found = opened(Thumbnails().url(strip))[1]
    assert found.n_frames == 5
    assert [frame.getpixel((0, 0))[0] for frame in clip_if_whole(strip.with_suffix(".webp"))] == pytest.approx(
        [0, 63, 127, 191, 255], abs=3
    )
    width, height = frames[0].size
    small = clip_if_whole(strip.with_suffix(".webp"), max(width, height) // 2)
    assert [max(frame.size) for frame in small] == [max(width, height) // 2] * 5
    strip.with_suffix(".webp").write_bytes(strip.with_suffix(".webp").read_bytes()[:80])
    assert clip_if_whole(strip.with_suffix(".webp")) == []
    assert opened(Thumbnails().url(strip))[1].is_animated is False


def test_pictures_and_pillow_without_webp_make_no_clip_and_keep_no_earlier_one(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.webp", as_clip(torch.rand(3, 5, 8, 8)))
    assert (tmp_path / "a.webp").exists()
    assert as_clip(torch.rand(3, 8, 8)) == b""
    monkeypatch.setattr("srpo_lightning.evaluation.pictures.features.check", lambda name: False)
    write_clip(tmp_path / "a.webp", as_clip(torch.rand(3, 5, 8, 8)))
    assert not (tmp_path / "a.webp").exists()


@pytest.mark.parametrize("most", [2, 3, 5, 20])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 20, 21, 22, 500])
def test_thinned_steps_are_few_enough_with_the_first_and_the_last(length, most):
    found = thinned(range(length), most)
    assert len(found) <= most
    assert found == sorted(set(found))
    if length:
        assert (found[0], found[-1]) == (0, length - 1)
    if length <= most:
        assert found == list(range(length))


def test_what_was_kept_before_is_kept_or_dropped_never_shifted():
    for length in range(1, 200):
        assert set(thinned(range(length), 10)) - {length - 1} >= set(thinned(range(length + 1), 10)) - {
            length,
            length - 1,
        }
