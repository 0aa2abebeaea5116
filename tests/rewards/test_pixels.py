import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from srpo_lightning.rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocessing, resize, resize_and_crop


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def smooth(height: int, width: int) -> torch.Tensor:
    """A picture of 8-bit values with detail but no noise, like a photograph; PIL clamps twice: leave it room."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    picture = torch.stack([x.sin() * y.cos(), (x + y).sin(), (x * y).cos()]) * 0.35 + 0.5
    return (picture * 255).round()[None] / 255


@pytest.mark.parametrize(("source", "target"), [((64, 64), (28, 28)), ((48, 80), (32, 20)), ((16, 16), (40, 24))])
def test_resizing_equals_pils_bicubic_to_the_rounding_of_its_8_bits(source, target):
    """PIL rounds after each of its two passes: within 1 / 255 everywhere, 0.4 / 255 on average."""
    images = smooth(*source)
    picture = Image.fromarray((images[0].permute(1, 2, 0) * 255).byte().numpy())
    theirs = torch.from_numpy(np.array(picture.resize(target[::-1], Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    difference = (resize(images, target)[0] - theirs).abs()
    assert difference.max() <= 1.01 / 255
    assert difference.mean() < 0.4 / 255


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


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_the_gradient_of_preprocessing_is_right(keep_aspect):
    """torch.autograd.gradcheck in float64, away from the clamp."""
    images = (draw(1, 3, 6, 8).double() * 0.5 + 0.25).requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing((4, 4), keep_aspect), (images,))


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
        ({}, Preprocessing((16, 16), True, CLIP_MEAN, CLIP_STD)),
        ({"crop_size": 20, "size": 24}, Preprocessing((20, 20))),
        ({"crop_size": {"height": 20, "width": 12}}, Preprocessing((20, 12))),
        ({"size": {"shortest_edge": 20}}, Preprocessing((20, 20))),
        ({"size": {"height": 20, "width": 12}, "do_center_crop": False}, Preprocessing((20, 12), False)),
        (
            {"size": {"height": 8, "width": 8}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": False},
            Preprocessing((8, 8), False),
        ),
        ({"image_mean": [0.5] * 3, "image_std": [0.1] * 3}, Preprocessing((16, 16), True, [0.5] * 3, [0.1] * 3)),
    ],
)
def test_a_processors_configuration_is_read_as_transformers_reads_it(config, expected):
    """Without centre crop `crop_size` means nothing, although CLIPImageProcessor always writes one."""
    assert Preprocessing.from_config(config, 16) == expected
