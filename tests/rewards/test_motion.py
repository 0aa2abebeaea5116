"""Motion: its exact value, its gradient, what flicker gains by it, and a sum with a reward of pictures."""

import pytest
import torch

from srpo_lightning.rewards import Motion, Reward, Term, WeightedReward
from srpo_lightning.rewards.base import seen_by

TEXTS = ["a cat", "b"]


class Red(Reward):
    """Scores one picture at a time."""

    def forward(self, images, texts):
        assert images.ndim == 4
        return images[:, 0].square().mean((1, 2))


def clips(dtype=torch.float64) -> torch.Tensor:
    return torch.rand(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)


def sliding(step: int) -> torch.Tensor:
    """A bar that is one of eight pixels wide, and moves by `step` pixels from frame to frame, over black."""
    frames = torch.zeros(1, 3, 4, 8, 8, dtype=torch.float64)
    for frame in range(4):
        frames[:, :, frame, :, (frame * step) % 8] = 1
    return frames


def test_a_bar_that_slides_scores_what_a_bar_changes_up_to_the_target():
    """Two of eight columns change by 1; the mean colour of a frame is the same in all."""
    assert Motion(target=1.0)(sliding(1), [""]) == pytest.approx(2 / 8)
    assert Motion(target=0.5)(sliding(1), [""]) == pytest.approx(0.5)
    assert Motion(target=0.1)(sliding(1), [""]) == 1
    assert Motion(target=0.5)(sliding(0), [""]) == 0


def test_light_that_flickers_gains_nothing_and_takes_nothing():
    light = torch.tensor([0.0, 0.3, 0.0, 0.3], dtype=torch.float64).view(1, 1, 4, 1, 1)
    assert Motion(target=0.5)(sliding(0) * 0 + light, [""]) == pytest.approx(0, abs=1e-12)
    dim = sliding(1) / 2
    torch.testing.assert_close(Motion(target=0.5)(dim + light, [""]), Motion(target=0.5)(dim, [""]))


def test_the_gradient_is_that_of_differences_below_the_target_and_none_above():
    assert torch.autograd.gradcheck(lambda x: Motion(target=0.9)(x, TEXTS), clips().requires_grad_())
    moving = clips().requires_grad_()
    (gradient,) = torch.autograd.grad(Motion(target=0.01)(moving, TEXTS).sum(), moving)
    assert not gradient.any()


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 3, 1, 6, 6)])
def test_pictures_of_one_frame_are_refused_in_one_line(shape):
    with pytest.raises(ValueError, match=r"num_frames and num_rewarded_frames above 1") as error:
        Motion(target=0.1)(torch.zeros(shape), TEXTS)
    assert "\n" not in str(error.value)


def test_a_sum_gives_each_term_what_it_reads_with_its_whole_gradient():
    reward = WeightedReward([Term(Red(), 2.0, 0.1, 0.5), Term(Motion(target=0.9), 0.5, 0.2, 2.0)])
    moving, frame = clips().requires_grad_(), Red()
    by_hand = 2 * (torch.stack([frame(own, TEXTS) for own in moving.unbind(2)]).mean(0) - 0.1) / 0.5
    by_hand = by_hand + 0.5 * (Motion(target=0.9)(moving, TEXTS) - 0.2) / 2
    found = reward(moving, TEXTS)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(
        *(torch.autograd.grad(own.sum(), moving, retain_graph=True)[0] for own in (found, by_hand))
    )
    torch.testing.assert_close(reward.scores(moving, [TEXTS, TEXTS])[:, 1], by_hand)
    coefficients = torch.tensor([[1.1, -1.0], [1.2, -1.0]], dtype=torch.float64)
    contrast = reward.contrast(moving, [TEXTS, TEXTS], coefficients)
    of_frames = seen_by(frame, moving, lambda own: frame.contrast(own, [TEXTS, TEXTS], coefficients))
    torch.testing.assert_close(contrast, 2 * (of_frames - 0.1 * coefficients.sum(1)) / 0.5)
    torch.testing.assert_close(reward.plain(moving, TEXTS), 0.5 * (Motion(target=0.9)(moving, TEXTS) - 0.2) / 2)
