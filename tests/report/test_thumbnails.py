"""Thumbnails are bounded, whatever a picture holds; steps are thinned so that those of a page before mostly stay."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from srpo_lightning.report.thumbnails import MAX_BYTES, SIDE_PX, data_uri, thinned


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
