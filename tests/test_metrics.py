"""Metrics against formulas written out for one image at a time."""

import colorsys
import itertools

import pytest
import torch

from srpo_lightning.metrics import Diversity, LabelShare, is_in_top, saturation


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_saturation_equals_the_mean_of_colorsys_over_the_pixels():
    images = draw(3, 3, 4, 5)
    images[0, :, 0, 0] = 0
    expected = [
        sum(colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.permute(1, 2, 0).reshape(-1, 3).tolist()) / 20
        for image in images
    ]
    torch.testing.assert_close(saturation(images), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_is_in_top_equals_looking_among_the_k_best(k):
    scores, truth = draw(20, 6), torch.arange(20) % 6
    expected = [int(t) in row.topk(k).indices.tolist() for row, t in zip(scores, truth, strict=True)]
    assert is_in_top(scores, truth, k).tolist() == expected


def test_label_share_equals_counting_and_sums_to_one():
    scores = draw(50, 4)
    share = LabelShare(4)
    share.update(scores)
    counts = [sum(max(range(4), key=row.__getitem__) == label for row in scores.tolist()) for label in range(4)]
    assert share.compute().tolist() == [count / 50 for count in counts]
    assert float(share.compute().sum()) == pytest.approx(1, abs=1e-12)


def test_diversity_equals_the_mean_over_all_pairs():
    features = draw(7, 5) - 0.5
    diversity = Diversity(5)
    diversity.update(features)
    pairs = [1 - torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(features.double(), 2)]
    assert float(diversity.compute()) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_diversity_of_copies_is_zero_and_of_one_image_undefined():
    diversity = Diversity(5)
    diversity.update(draw(1, 5))
    assert diversity.compute().isnan()
    diversity.update(draw(1, 5))
    assert float(diversity.compute()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("metric", "width"), [(LabelShare, 4), (Diversity, 4)])
def test_two_halves_equal_the_whole(metric, width):
    values = draw(30, width)
    whole, halves = metric(width), metric(width)
    whole.update(values)
    for half in values.split([13, 17]):
        halves.update(half)
    torch.testing.assert_close(halves.compute(), whole.compute(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("metric", "width"), [(LabelShare, 4), (Diversity, 4)])
def test_a_metric_starts_anew_after_reset(metric, width):
    values = draw(30, width)
    once, again = metric(width), metric(width)
    once.update(values)
    again.update(draw(10, width))
    again.reset()
    again.update(values)
    assert torch.equal(once.compute(), again.compute())
