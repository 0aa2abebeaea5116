import io

import numpy as np
import pytest
import torch
from PIL import Image

from srpo_lightning.data.colours import size_as_seen
from srpo_lightning.data.images import LatentCache, Picture, latent_key, load_picture, nearest
from srpo_lightning.policies.packing import pack
from tests import tiny


def save(path, picture: Image.Image, **settings) -> str:
    picture.save(path, **settings)
    return str(path)


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (64, 96)])
def test_a_picture_is_scaled_by_its_short_side_and_cropped_in_the_middle(tmp_path, width, height):
    pixels = load_picture(Picture(save(tmp_path / "a.png", halves(width, height)), (32, 32)))
    assert pixels.shape == (3, 32, 32)
    assert pixels[0, :, :14].min() > 0.99
    assert pixels[2, :, 18:].min() > 0.99
    assert pixels[0, :, 18:].max() < 0.01


def test_fine_detail_is_averaged_not_sampled(tmp_path):
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    pixels = load_picture(Picture(save(tmp_path / "a.png", checks), (16, 16)))
    assert (pixels - 0.5).abs().max() < 0.02


def test_a_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken on its side: what is left is up
    path = save(tmp_path / "a.jpg", halves(64, 32), exif=exif, quality=100)
    assert size_as_seen(path) == (64, 32)
    pixels = load_picture(Picture(path, (64, 32)))
    assert pixels[0, :28].mean() > 0.95
    assert pixels[2, 36:].mean() > 0.95


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(tmp_path, mode):
    path = save(tmp_path / "a.png", Image.new("RGBA", (16, 16), (255, 0, 0, 0)).convert(mode))
    assert load_picture(Picture(path, (16, 16))).min() == 1


def test_grey_pictures_have_three_channels(tmp_path):
    pixels = load_picture(Picture(save(tmp_path / "a.png", Image.new("L", (16, 16), 51)), (16, 16)))
    assert torch.equal(pixels, torch.full((3, 16, 16), 0.2))


@pytest.mark.parametrize("content", [b"no picture", b""])
def test_a_damaged_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for read in (lambda path: load_picture(Picture(path, (16, 16))), size_as_seen):
        with pytest.raises(ValueError, match=r"a.png cannot be read .*replace it"):
            read(str(tmp_path / "a.png"))


def test_a_picture_that_is_cut_off_is_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    halves(64, 64).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:-200])
    with pytest.raises(ValueError, match=r"a.jpg cannot be read"):
        load_picture(Picture(str(tmp_path / "a.jpg"), (16, 16)))


def test_a_missing_picture_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.png cannot be read \(No such file"):
        load_picture(Picture(str(tmp_path / "nowhere.png"), (16, 16)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 100), (64, 64)),
        ((50, 100), (32, 64)),
        ((72, 100), (64, 64)),
        ((70, 100), (32, 64)),
        ((300, 100), (64, 32)),
    ],
)
def test_a_picture_goes_to_the_size_of_the_nearest_aspect_ratio(size, expected):
    assert nearest(size, [(64, 64), (32, 64), (64, 32)]) == expected


def test_the_encoder_gives_the_mode_of_the_vae_in_the_policys_packing(models):
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    vae = tiny.new_policy(models).vae
    with torch.no_grad():
        expected = pack((vae.encode(images * 2 - 1).latent_dist.mode() - 0.1) * 0.7)
    found = tiny.image_encoder(models.pipeline).encode(images)
    assert found.shape == (2, 2, 16)
    assert torch.allclose(found, expected, atol=1e-6)


def test_latents_may_be_a_sample_of_the_posterior_which_depends_on_the_picture_alone(models):
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    many = torch.cat([picture + 1e-6 * i for i in range(200)]).clamp(0, 1)
    drawn, mode = (tiny.image_encoder(models.pipeline, draw) for draw in (True, False))
    assert torch.equal(drawn.encode(many[:2])[1], drawn.encode(many[1:3])[0])
    assert drawn.description()["fingerprint"] != mode.description()["fingerprint"]
    vae = tiny.new_policy(models).vae
    with torch.no_grad():
        std = pack(vae.encode(picture * 2 - 1).latent_dist.std * 0.7)
    noise = (drawn.encode(many) - mode.encode(many)) / std
    assert noise.mean().abs() < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.fixture
def cached(models, tmp_path):
    encoder = tiny.image_encoder(models.pipeline)
    sizes = [(32, 32), (16, 32), (32, 32)]
    pictures = [Picture(save(tmp_path / f"{i}.png", halves(48, 32 + i)), size) for i, size in enumerate(sizes)]
    cache = LatentCache(str(tmp_path / "cache"), encoder.description())
    assert cache.add(pictures, encoder.encode, 2) == 3
    return cache, encoder, pictures


def test_latents_of_several_sizes_are_kept_as_they_were_made(cached):
    cache, encoder, pictures = cached
    for picture, row in zip(pictures, cache.find([latent_key(picture) for picture in pictures]), strict=True):
        expected = encoder.encode(load_picture(picture)[None])[0]
        assert cache.latents(int(row)).shape == (picture.size[0] * picture.size[1] // 256, 16)
        assert torch.allclose(cache.latents(int(row)), expected, atol=1e-5)


def test_a_picture_that_changes_or_gets_another_size_is_encoded_anew(cached, tmp_path):
    cache, encoder, pictures = cached
    assert cache.add(pictures, encoder.encode, 2) == 0
    other_size = pictures[0]._replace(size=(16, 16))
    save(tmp_path / "1.png", halves(16, 16))
    assert cache.missing([*pictures, other_size]) == [pictures[1], other_size]
    assert cache.add([*pictures, other_size], encoder.encode, 2) == 2


def test_another_vae_gets_another_folder(models, tmp_path):
    other = tiny.write_pipeline(tmp_path / "other", seed=5)
    (other / "vae" / ".ipynb_checkpoints").mkdir()
    one, two = (tiny.image_encoder(path).description() for path in (models.pipeline, other))
    assert one["fingerprint"] != two["fingerprint"]
    assert tiny.image_encoder(models.pipeline, True).description()["fingerprint"] != one["fingerprint"]
