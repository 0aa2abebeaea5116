"""Statistics against formulas and packages of others, and intervals against studies whose truth is known."""

import math

import krippendorff
import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from srpo_lightning.ratings.statistics import (
    agreement,
    rank_correlation,
    ranks,
    resampled,
    share,
    strengths,
    strengths_with_intervals,
)


def test_a_share_of_independent_answers_has_wilsons_interval():
    """One answer per prompt, 3 of 20; the variance between G prompts is divided by G - 1, so that they are worth 19."""
    found = share(np.array([1.0] * 3 + [0.0] * 17), np.arange(20))
    z, size = 1.959964, 19
    centre = (0.15 + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(0.15 * 0.85 / size + z**2 / (4 * size**2))
    assert found == pytest.approx((0.15, centre - half, centre + half), abs=1e-6)


def test_answers_that_repeat_each_other_make_no_interval_narrower():
    values = np.random.default_rng(0).integers(0, 2, 30).astype(float)
    once = share(values, np.arange(30))
    repeated = share(values.repeat(4), np.arange(30).repeat(4))
    assert repeated == pytest.approx(once, abs=1e-9)
    assert share(values.repeat(4), np.arange(120)).half < 0.6 * once.half


def test_a_share_of_none_or_all_still_has_a_width():
    """Of prompts: 36 answers to 12 of them are worth 12. 3 / n, the rule of three, is the bound of one side."""
    none = share(np.zeros(36), np.repeat(np.arange(12), 3))
    assert none.value == none.low == 0
    assert none.high == pytest.approx(1.959964**2 / (12 + 1.959964**2), abs=1e-6)
    everything = share(np.ones(36), np.repeat(np.arange(12), 3))
    assert everything == pytest.approx((1, 1 - none.high, 1), abs=1e-9)
    assert math.isnan(share(np.ones(5), np.zeros(5)).low)


@pytest.mark.parametrize("truth", [0.03, 0.2, 0.5])
def test_an_interval_of_a_share_holds_the_truth(truth):
    """400 studies of 24 prompts and 3 raters, prompts differing as much as within themselves."""
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        own = chance.beta(truth, 1 - truth, 24)
        values = (chance.random((24, 3)) < own[:, None]).astype(float).ravel()
        found = share(values, np.repeat(np.arange(24), 3))
        held += found.low <= truth <= found.high
    assert 0.91 < held / 400 < 0.99


def test_strengths_of_two_are_the_corrected_log_odds():
    found = strengths(np.array([[0.0, 7.0], [3.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(math.log(7.5 / 3.5), abs=1e-8)
    assert found.sum() == pytest.approx(0, abs=1e-12)
    assert strengths(np.array([[0.0, 9.0], [0.0, 0.0]]))[0] == pytest.approx(math.log(9.5 / 0.5) / 2, abs=1e-8)


def test_strengths_are_those_of_the_greatest_likelihood():
    """By a general optimiser on the same likelihood, of five sources at once with half a win each way."""
    wins = np.random.default_rng(2).integers(0, 9, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    corrected = torch.tensor(wins + 0.5 * ((wins + wins.T) > 0))
    log_strength = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_strength], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():
        optimizer.zero_grad()
        value = -(corrected * torch.nn.functional.logsigmoid(log_strength[:, None] - log_strength[None])).sum()
        value.backward()
        return value

    optimizer.step(loss)
    expected = (log_strength - log_strength.mean()).detach().numpy()
    assert strengths(wins) == pytest.approx(expected, abs=1e-6)
    assert strengths(np.stack([wins, wins.T]))[1] == pytest.approx(strengths(wins.T), abs=1e-9)


def test_sources_that_were_never_compared_have_no_strength():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 3
    assert np.isnan(strengths(wins)).all()
    wins[1, 2] = 1
    assert np.isfinite(strengths(wins)).all()


def test_intervals_of_strengths_hold_the_truth():
    """100 studies of 40 prompts whose prompts differ not at all: three sources of known strength."""
    truth = np.array([0.6, 0.0, -0.6])
    chance = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    random = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        wins = np.triu(random.binomial(3, chance, (40, 3, 3)), 1).astype(float)
        wins += np.tril(3 - wins.swapaxes(1, 2), -1)
        held += sum(i.low <= t <= i.high for i, t in zip(strengths_with_intervals(wins), truth, strict=True))
    assert 0.88 < held / 300 < 0.99


def test_rank_correlation_is_spearmans_with_ties():
    random = np.random.default_rng(4)
    a, b = random.integers(0, 5, 40).astype(float), random.normal(size=40)
    expected = float(spearman_corrcoef(torch.tensor(a), torch.tensor(b)))
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-4)
    assert list(ranks(np.array([3.0, 1.0, 3.0, 2.0]))) == [3.5, 1, 3.5, 2]
    assert rank_correlation(b, np.exp(b)) == pytest.approx(1)
    assert rank_correlation(b, -b) == pytest.approx(-1)
    assert math.isnan(rank_correlation(b, np.ones(40)))


def test_whole_prompts_are_drawn_again():
    groups = np.repeat(np.arange(10), 50)
    values = np.repeat(np.random.default_rng(5).normal(size=10), 50)

    def mean(rows):
        return float(values[rows].mean())

    together = resampled(mean(np.arange(500)), groups, mean)
    alone = resampled(mean(np.arange(500)), np.arange(500), mean)
    assert together.half > 4 * alone.half
    assert together.low < together.value < together.high
    assert math.isnan(resampled(1.0, np.zeros(500), mean).low)


def test_agreement_is_krippendorffs():
    """Against the package's other input, which is raters by units with NaN where one did not answer."""
    random = np.random.default_rng(6)
    truth = random.integers(0, 4, 60)
    given = np.clip(truth + random.integers(-1, 2, (4, 60)), 0, 3).astype(float)
    given[random.random((4, 60)) < 0.2] = np.nan
    counts = np.stack([(given == value).sum(0) for value in range(4)], axis=1)
    for level in ("nominal", "ordinal"):
        expected = krippendorff.alpha(given, level_of_measurement=level, value_domain=[0.0, 1.0, 2.0, 3.0])
        found = agreement(counts, np.arange(60), level)
        assert found.value == pytest.approx(expected, abs=1e-9)
        assert found.low < found.value < found.high
    assert agreement(counts, np.arange(60), "ordinal").value > agreement(counts, np.arange(60), "nominal").value + 0.2


def test_agreement_of_one_rater_or_of_one_value_is_unknown():
    assert math.isnan(agreement(np.eye(3, dtype=int), np.arange(3), "nominal").value)
    assert math.isnan(agreement(np.array([[2, 0], [2, 0]]), np.arange(2), "nominal").value)
    assert agreement(np.array([[2, 0], [0, 2]] * 9), np.arange(18), "nominal").value == 1
