"""Metrics against formulas written out for one image, one pair or one resample at a time."""

import colorsys
import itertools
import math
from importlib import import_module
from runpy import run_path

import pytest
import torch

from srpo_lightning.evaluation.metrics import (
    SampleTable,
    bootstrap_mean,
    cmmd,
    diversity,
    is_in_top,
    most_like,
    prompt_diversity,
    wins,
)
from srpo_lightning.picture_statistics import (
    CLIP_STATISTICS,
    PICTURE_STATISTICS,
    STATISTICS,
    Statistic,
    brightness,
    high_frequency,
    luma,
    saturation,
)


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pixels(images: torch.Tensor) -> list[list[list[float]]]:
    return [image.permute(1, 2, 0).reshape(-1, 3).tolist() for image in images]


def test_saturation_equals_the_mean_of_colorsys_over_the_pixels():
    images = draw(3, 3, 4, 5)
    images[0, :, 0, 0] = 0
    expected = [sum(colorsys.rgb_to_hsv(*pixel)[1] for pixel in image) / 20 for image in pixels(images)]
    torch.testing.assert_close(saturation(images), torch.tensor(expected), rtol=0, atol=1e-6)


def test_brightness_is_the_luma_of_rec_709():
    images = draw(3, 3, 4, 5)
    expected = [sum(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in image) / 20 for image in pixels(images)]
    torch.testing.assert_close(brightness(images), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("period_px", "share"), [(2, 1.0), (3, 1.0), (8, 0.0), (16, 0.0)])
@pytest.mark.parametrize("along", [0, 1])
def test_waves_shorter_than_four_pixels_are_high_frequency(period_px, share, along):
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * torch.arange(48) / period_px)
    image = (wave[:, None] if along == 0 else wave[None]).expand(48, 48)
    assert float(high_frequency(image.expand(1, 3, 48, 48))) == pytest.approx(share, abs=1e-5)


def test_high_frequency_is_a_share_of_the_variance():
    """Two waves of unequal height: 0.3^2 of 0.3^2 + 0.1^2; one colour has none."""
    places = 2 * math.pi * torch.arange(48)
    image = 0.5 + 0.3 * torch.cos(places / 3) + 0.1 * torch.cos(places / 12)
    images = torch.stack([image.expand(3, 48, 48), torch.full((3, 48, 48), 0.3)])
    assert high_frequency(images).tolist() == pytest.approx([0.9, 0.0], abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_is_in_top_equals_looking_among_the_k_best(k):
    scores, truth = draw(20, 6), torch.arange(20) % 6
    expected = [int(t) in row.topk(k).indices.tolist() for row, t in zip(scores, truth, strict=True)]
    assert is_in_top(scores, truth, k).tolist() == expected


def test_what_is_not_a_number_is_in_no_measure_a_number():
    """Of a picture that is not, of scores of which one is not, and of what is compared with it."""
    images = draw(2, 3, 4, 4)
    images[1, 0, 1, 1] = math.nan
    scores = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [0.0, math.nan]])
    for found in (saturation(images), brightness(images), high_frequency(images)):
        assert found.isnan().tolist() == [False, True]
    for found in (is_in_top(scores, torch.tensor([1, 1, 1]), 1), most_like(scores)):
        assert (found[0], found.isnan().tolist()) == (1, [False, True, True])
    ours, theirs = torch.tensor([1.0, math.nan, 1.0]), torch.tensor([0.0, 0.0, math.nan])
    assert wins(ours, theirs).isnan().tolist() == [False, True, True]


def table_of(indices: list[int], metric: SampleTable | None = None) -> SampleTable:
    """Of which every number is known from its index."""
    metric = metric or SampleTable(["a", "b"], num_prompts=3)
    i = torch.tensor(indices)
    metric.update(i, {"b": 10.0 * i, "a": i / 8}, torch.stack([i + 1.0, -i, 0.0 * i], dim=1))
    return metric


def test_a_table_has_every_sample_once_in_order_whatever_the_batches_were():
    metric = table_of([4, 0, 2])
    table = table_of([1, 0, 3], metric).table()
    assert table.indices.tolist() == [0, 1, 2, 3, 4]
    assert table.groups.tolist() == [0, 1, 2, 0, 1]
    assert table.columns["a"].tolist() == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert table.columns["b"].tolist() == [0, 10, 20, 30, 40]
    torch.testing.assert_close(table.features.norm(dim=1), torch.ones(5))
    assert table.where(table.columns["a"] > 0.3).indices.tolist() == [3, 4]


@pytest.mark.parametrize("width", [0, 1, 3])
def test_a_table_of_one_sample_has_its_dimensions(width):
    """torchmetrics takes them from tensors of one number."""
    metric = SampleTable(["a"], num_prompts=1)
    metric.update(torch.tensor([0]), {"a": torch.ones(1)}, torch.ones(1, width))
    table = metric.table()
    assert [t.shape for t in (table.indices, table.groups, table.columns["a"])] == [(1,)] * 3
    assert table.features.shape == (1, width)


def test_a_table_starts_anew_after_reset():
    metric = table_of([5])
    metric.reset()
    assert table_of([1, 2], metric).table().indices.tolist() == [1, 2]


def test_wins_count_ties_half():
    assert wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 4.0])).tolist() == [0.5, 1.0, 0.0]


def test_the_bootstrap_interval_of_many_alike_is_the_normal_one():
    """mean +- 1.96 std / sqrt(N), to a few percent of its width."""
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / math.sqrt(4000)
    assert found.value == pytest.approx(float(values.mean()), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_copies_of_a_prompts_samples_do_not_narrow_the_interval():
    """Whole prompts are resampled: eight copies of each value say no more than one."""
    values = draw(40).double()
    once = bootstrap_mean(values)
    copies = bootstrap_mean(values.repeat_interleave(8), torch.arange(40).repeat_interleave(8))
    alone = bootstrap_mean(values.repeat_interleave(8))
    assert copies == pytest.approx(once, abs=1e-9)
    assert alone.high - alone.low < 0.5 * (once.high - once.low)


def test_one_prompt_has_no_interval():
    found = bootstrap_mean(draw(8), torch.zeros(8, dtype=torch.int64))
    assert not found.is_known
    assert found.value == pytest.approx(float(draw(8).double().mean()))


@pytest.mark.parametrize(("count", "coverage"), [(3, 0.72), (8, 0.88), (12, 0.92)])
def test_intervals_over_few_prompts_hold_the_mean_less_often_than_they_say(count, coverage):
    values = torch.randn(600, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = sum(i.low <= 0 <= i.high for i in map(bootstrap_mean, values)) / len(values)
    assert held == pytest.approx(coverage, abs=0.04)  # three standard deviations of 600 draws or more


def test_groups_of_unequal_size_weigh_by_their_samples():
    found = bootstrap_mean(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 9]))
    assert found == pytest.approx((0.75, 0.0, 1.0))


def test_diversity_equals_the_mean_over_all_pairs():
    features = draw(7, 5) - 0.5
    pairs = [1 - torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(features.double(), 2)]
    assert diversity(features) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_diversity_of_copies_is_zero_and_of_one_image_undefined():
    assert math.isnan(diversity(draw(1, 5)))
    assert diversity(draw(1, 5).repeat(2, 1)) == pytest.approx(0, abs=1e-12)


def test_the_diversity_of_prompts_is_the_mean_of_theirs_that_have_several_images():
    features, groups = draw(6, 5) - 0.5, torch.tensor([3, 1, 3, 1, 1, 8])
    expected = (diversity(features[groups == 1]) + diversity(features[groups == 3])) / 2
    assert prompt_diversity(features, groups) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(prompt_diversity(features, torch.arange(6)))


def test_cmmd_equals_the_kernel_written_out():
    """Source: arXiv 2401.09603, with sigma 10 and scale 1000 as its code has them."""
    x, y = (draw(count, 4).double() - 0.5 for count in (5, 7))
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)

    def mean(a, b):
        terms = [math.exp(-float((p - q).square().sum()) / (2 * 10**2)) for p in a for q in b]
        return sum(terms) / len(terms)

    assert cmmd(3 * x, 2 * y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_every_statistic_of_pictures_says_what_it_is_and_is_a_number_of_each_picture():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, statistic in PICTURE_STATISTICS.items():
        assert statistic.meaning, name
        assert statistic.measure(images).shape == (2,), name


def test_a_statistic_of_pictures_is_a_column_and_is_compared_if_it_says_so(monkeypatch):
    """A function and a line are all that a new one needs."""
    added = {"red": Statistic(lambda images: images[:, 0].mean((-2, -1)), is_compared=True)}
    monkeypatch.setattr("srpo_lightning.picture_statistics.PICTURE_STATISTICS", PICTURE_STATISTICS | added)
    names = ["srpo_lightning.evaluation.comparison", "srpo_lightning.callbacks.measures"]
    comparison, measures = (run_path(import_module(name).__file__, run_name=name) for name in names)
    assert "red" not in comparison["NOT_WON"]
    assert "saturation" in comparison["NOT_WON"]
    assert "red" in measures["OWN_COLUMNS"]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_not_rounded_by_autocast(name):
    """Which computes products of matrices in bfloat16, of which a GPU has no Fourier transform."""
    shown = torch.rand(2, 3, *((4,) if name in CLIP_STATISTICS else ()), 16, 16)
    expected = STATISTICS[name].measure(shown)
    with torch.autocast("cpu", torch.bfloat16):
        found = STATISTICS[name].measure(shown)
        assert luma(torch.rand(1, 3, 4, 4)).dtype == torch.float32
    assert torch.equal(found, expected)
