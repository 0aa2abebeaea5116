"""WeightedReward: its sums against the terms by hand, its gradient against autograd's own."""

import pytest
import torch

from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.objectives.base import Rollout
from srpo_lightning.rewards import ClipReward, Reward, Term, WeightedReward
from srpo_lightning.rewards.weighted import eagerly
from tests import tiny

TEXTS = ["a cat", "b"]
COLUMNS = [["x. a cat", "x. b"], ["z. a cat", "z. b"]]
COEFFICIENTS = torch.tensor([[1.1, -1.0], [1.2, -1.0]])


class Brightness(Reward):
    """Reads no text."""

    reads_text = False

    def forward(self, images, texts):
        return images.square().mean((1, 2, 3))


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture
def parts(models):
    return tiny.new_reward(models.clip), tiny.new_reward(models.judge), Brightness()


@pytest.fixture
def reward(parts):
    clip, judge, brightness = parts
    terms = [Term(clip, 2.0, 0.1, 0.5), Term(judge, 0.5, -0.2, 2.0, plain=True), Term(brightness, -1.0, 0.3, 0.1)]
    return WeightedReward(terms)


def by_hand(parts, x):
    clip, judge, brightness = parts
    plain = 0.5 * (judge(x, TEXTS) + 0.2) / 2 - (brightness(x, TEXTS) - 0.3) / 0.1
    normal = [(clip(x, column) - 0.1) / 0.5 for column in COLUMNS]
    contrast = 2 * (COEFFICIENTS[:, 0] * normal[0] + COEFFICIENTS[:, 1] * normal[1])
    return contrast, plain


def test_the_score_is_the_weighted_sum_of_normalised_scores(parts, reward):
    with torch.no_grad():
        expected = by_hand(parts, images())[1] + 2 * (parts[0](images(), TEXTS) - 0.1) / 0.5
        torch.testing.assert_close(reward(images(), TEXTS), expected)
        torch.testing.assert_close(reward.scores(images(), [TEXTS, TEXTS])[:, 1], expected)


def test_words_steer_the_relative_terms_and_leave_the_plain_ones_alone(parts, reward):
    with torch.no_grad():
        contrast, plain = by_hand(parts, images())
        torch.testing.assert_close(reward.contrast(images(), COLUMNS, COEFFICIENTS), contrast)
        torch.testing.assert_close(reward.plain(images(), TEXTS), plain)


def test_the_gradient_of_the_sum_equals_that_of_the_terms(parts, reward):
    ours, theirs = (images().requires_grad_() for _ in range(2))
    upstream = torch.tensor([1.5, -0.5])
    (reward.contrast(ours, COLUMNS, COEFFICIENTS) + reward.plain(ours, TEXTS)).backward(upstream)
    sum(by_hand(parts, theirs)).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad.abs().amax((1, 2, 3)) > 0).all()


def test_the_gradient_taken_at_once_passes_gradcheck():
    small = images(torch.float64)[..., :2, :2].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: eagerly(lambda y: y.square().sum((1, 2, 3)).sin(), x), (small,))


def test_each_terms_graph_is_freed_before_the_next_ones_is_built():
    live, seen = [0], []

    class Tracked(Brightness):
        def forward(self, x, texts):
            live[0] += 1
            seen.append(live[0])
            scores = super().forward(x, texts)
            scores.grad_fn.register_hook(lambda *_: live.__setitem__(0, live[0] - 1))
            return scores

    WeightedReward([Term(Tracked()) for _ in range(3)])(images().requires_grad_(), TEXTS)
    assert seen == [1, 1, 1]


def test_an_image_with_nan_scores_nan_and_leaves_the_others_alone(reward):
    broken = images()
    broken[1, 0, 0, 0] = torch.nan
    pixels = broken.requires_grad_()
    scores = reward(pixels, TEXTS)
    assert scores.isnan().tolist() == [False, True]
    torch.testing.assert_close(scores[0], reward(images(), TEXTS)[0])
    (gradient,) = torch.autograd.grad(scores[0], pixels)
    assert gradient[0].isfinite().all()


def test_in_srpo_the_plain_terms_reward_one_branch_and_penalise_the_other(models):
    """For a plain reward P the losses' pull at x0_hat is -P' in the denoising and +P' in the inversion branch."""
    policy = tiny.new_policy(models)
    clip = tiny.new_reward(models.clip)
    noise = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    rollout, conditions = Rollout(noise / 2, noise), tiny.new_conditions(1)
    words = ControlWords(["x"], ["z"])

    def rewards(reward):
        outcome = SRPO(words, margin=100.0).loss(policy, reward, conditions, rollout, Draws(0))
        return outcome.scalars["reward_denoise"], outcome.scalars["reward_inversion"]

    alone = rewards(WeightedReward([Term(clip)]))
    torch.testing.assert_close(alone, rewards(clip))
    with_plain = rewards(WeightedReward([Term(clip), Term(Brightness(), weight=3.0)]))
    assert with_plain[0] - alone[0] > 0.1
    assert with_plain[1] - alone[1] < -0.1


def test_a_sum_that_no_words_can_steer_is_refused_before_anything_is_read(models):
    clip = ClipReward(str(models.clip))
    objective = SRPO(ControlWords(["x"], ["z"]))
    with pytest.raises(ValueError, match="give it a term that reads text with `plain: false`"):
        objective.check_reward(WeightedReward([Term(clip, plain=True), Term(Brightness())]))
    with pytest.raises(ValueError, match=r"Brightness reads no text.*WeightedReward beside a reward that reads text"):
        tiny.new_module(models, Brightness())
    objective.check_reward(WeightedReward([Term(clip), Term(Brightness())]))
    with pytest.raises(ValueError, match="no terms: give at least one"):
        WeightedReward([])


def test_loading_reads_every_term_and_freezes_it(models):
    reward = WeightedReward([Term(ClipReward(str(models.clip))), Term(ClipReward(str(models.judge)))])
    assert list(reward.parameters()) == []
    reward.load()
    assert len(list(reward.parameters())) == 2 * len(list(reward.terms[0].reward.parameters()))
    assert not any(p.requires_grad for p in reward.parameters())


def test_too_few_frames_for_a_term_are_refused_before_anything_is_read(models):
    class Eight(Brightness):
        reads_clips = True

        def check_frames(self, num_frames):
            super().check_frames(num_frames)
            if num_frames < 8:
                raise ValueError("eight frames")

    reward = WeightedReward([Term(ClipReward(str(models.clip))), Term(Eight())])
    reward.check_frames(8)
    with pytest.raises(ValueError, match="eight frames"):
        reward.check_frames(2)
