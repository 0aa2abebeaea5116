import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil

from srpo_lightning.rewards.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    products,
    resize,
    resize_and_crop,
    resize_and_pad,
)


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def smooth(height: int, width: int) -> torch.Tensor:
    """A picture of 8-bit values with detail but no noise, like a photograph; PIL clamps twice: leave it room."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    picture = torch.stack([x.sin() * y.cos(), (x + y).sin(), (x * y).cos()]) * 0.35 + 0.5
    return (picture * 255).round()[None] / 255


def noise(height: int, width: int) -> torch.Tensor:
    """The hardest picture: every pixel black or white."""
    return (draw(1, 3, height, width) > 0.5).float()


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", [smooth, noise])
@pytest.mark.parametrize(
    ("source", "target"),
    [((64, 64), (28, 28)), ((48, 80), (32, 20)), ((16, 16), (40, 24)), ((225, 333), (224, 332)), ((100, 37), (50, 90))],
)
def test_resizing_equals_pils_filter_to_one_of_its_8_bit_levels(kind, source, target, resample):
    """PIL rounds after each of its two passes; without those roundings the two differ by less than 1e-5."""
    images = kind(*source)
    picture = Image.fromarray((images[0].permute(1, 2, 0) * 255).byte().numpy())
    pils = Image.Resampling[resample.upper()]
    height_first = target[0] < source[0] and target[1] > source[1]
    if height_first and int(PIL.__version__.partition(".")[0]) < 13:  # which would take the width first
        picture = picture.resize((source[1], target[0]), pils)
    theirs = torch.from_numpy(np.array(picture.resize(target[::-1], pils))).permute(2, 0, 1)
    levels = resize(images, target, resample=resample)[0] * 255
    assert (levels.round() - theirs).abs().max() <= 1
    assert (levels - theirs).abs().mean() < 0.4


def test_without_clamp_resizing_equals_pils_bicubic_in_floating_point():
    """PIL's mode F neither rounds nor clamps."""
    for source, target in [((64, 64), (28, 28)), ((16, 20), (40, 24))]:
        images = noise(*source)
        theirs = [
            np.array(Image.fromarray(channel.numpy()).resize(target[::-1], Image.Resampling.BICUBIC))
            for channel in images[0]
        ]
        ours = resize(images, target, clamp=False)[0]
        assert ours.max() > 1
        torch.testing.assert_close(ours, torch.from_numpy(np.stack(theirs)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "size"), [((64, 48), (64, 20)), ((37, 50), (90, 50)), ((64, 64), (28, 28))])
def test_on_a_gpu_products_with_interpolates_weights_have_its_values_and_gradient(source, size):
    """In float64, in which both are exact to rounding; bfloat16 under autocast is resized in float64 too."""
    images = torch.rand(2, 3, *source, dtype=torch.float64, requires_grad=True)
    expected = functional.interpolate(images, size=size, mode="bicubic", antialias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = products(images, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.rand_like(found)
    gradients = (torch.autograd.grad(resized, images, upstream)[0] for resized in (found, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_padding_keeps_the_whole_picture_centred_on_black():
    padded = resize_and_pad(torch.ones(1, 3, 10, 20), (16, 16))
    torch.testing.assert_close(padded[0, 0].amax(1), torch.tensor([0.0] * 4 + [1.0] * 8 + [0.0] * 4))
    assert resize_and_pad(torch.ones(1, 3, 1, 500), (16, 16)).sum().item() == pytest.approx(3 * 16)
    images = draw(1, 3, 16, 16)
    assert torch.equal(resize_and_pad(images, (16, 16)), images)


def test_half_a_pixel_of_the_crop_is_rounded_to_even_or_down():
    """23 wide at height 16: 7 columns to spare, half of which torchvision's CenterCrop rounds to 4, others to 3."""
    images = torch.arange(23.0).expand(1, 3, 16, 23) / 23
    assert resize_and_crop(images, (16, 16), half_even=True)[0, 0, 0, 0] == images[0, 0, 0, 4]
    assert resize_and_crop(images, (16, 16))[0, 0, 0, 0] == images[0, 0, 0, 3]


def test_half_precision_is_resized_in_float32():
    images = draw(1, 3, 20, 20).bfloat16()
    pixels = Preprocessing((8, 8))(images)
    assert torch.equal(pixels, Preprocessing((8, 8))(images.float()))


def test_the_right_size_is_returned_untouched():
    images = draw(2, 3, 16, 24)
    assert resize(images, (16, 24)) is images
    assert torch.equal(resize_and_crop(images, (16, 24)), images)


def test_overshoot_is_clamped():
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:] = 1
    larger = resize(images, (20, 20))
    assert larger.min() == 0
    assert larger.max() == 1


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_the_gradient_of_preprocessing_is_right(fit):
    """torch.autograd.gradcheck in float64, away from the clamp."""
    images = (draw(1, 3, 6, 8).double() * 0.5 + 0.25).requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing((4, 4), fit), (images,))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 40), (49, 98), (31, 17), (33, 99)])
@pytest.mark.parametrize("crop", [True, False])
def test_pixels_equal_the_image_processors(height, width, crop):
    """transformers' CLIPImageProcessor on the same 8-bit picture, to one step of 8 bits (each over the std)."""
    size = {"shortest_edge": 16} if crop else {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16}, do_center_crop=crop)
    images = smooth(height, width)
    picture = Image.fromarray((images[0].permute(1, 2, 0) * 255).byte().numpy())
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = Preprocessing.from_config(processor.to_dict(), 16)(images)
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() * torch.tensor(CLIP_STD).view(3, 1, 1)).max() <= 1.05 / 255


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Preprocessing((16, 16), "crop", CLIP_MEAN, CLIP_STD)),
        ({"crop_size": 20, "size": 24}, Preprocessing((20, 20))),
        ({"crop_size": {"height": 20, "width": 12}}, Preprocessing((20, 12))),
        ({"size": {"shortest_edge": 20}}, Preprocessing((20, 20))),
        ({"size": {"height": 20, "width": 12}, "do_center_crop": False}, Preprocessing((20, 12), "squash")),
        (
            {"size": {"height": 8, "width": 8}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": False},
            Preprocessing((8, 8), "squash"),
        ),
        ({"image_mean": [0.5] * 3, "image_std": [0.1] * 3}, Preprocessing((16, 16), "crop", [0.5] * 3, [0.1] * 3)),
    ],
)
def test_a_processors_configuration_is_read_as_transformers_reads_it(config, expected):
    """Without centre crop `crop_size` means nothing, although CLIPImageProcessor always writes one."""
    assert Preprocessing.from_config(config, 16) == expected


def test_the_filter_is_the_processors_and_another_is_refused():
    assert Preprocessing.from_config({"resample": 2}, 16).resample == "bilinear"
    assert Preprocessing.from_config({}, 16).resample == "bicubic"
    with pytest.raises(ValueError, match=r"resample 1, which is not known here: it is 2 \(bilinear\) or 3 \(bicubic\)"):
        Preprocessing.from_config({"resample": 1}, 16)
