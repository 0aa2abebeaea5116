import torch

from srpo_lightning.callbacks import SampleLogger
from srpo_lightning.callbacks.samples import as_bytes, grid
from tests import tiny


def test_a_grid_is_filled_row_by_row_and_padded_with_black():
    images = torch.arange(1, 6).view(5, 1, 1, 1).expand(5, 3, 2, 4)
    picture = grid(images, 3)
    assert picture.shape == (3, 4, 12)
    assert picture[0, ::2, ::4].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_pixels_are_rounded_to_the_nearest_byte():
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0])
    assert as_bytes(images).tolist() == [0, 0, 1, 255]
    assert as_bytes(images).dtype == torch.uint8


def test_no_more_samples_are_kept_than_asked_and_they_are_the_first(models, features, tmp_path):
    trainer = tiny.new_trainer(tmp_path, [SampleLogger(num_samples=2)], limit_val_batches=9)
    trainer.validate(tiny.new_module(models), tiny.new_data(models, features), verbose=False)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["00000.png", "00001.png"]
