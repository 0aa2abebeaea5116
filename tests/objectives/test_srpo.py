import inspect

import pytest
import torch
from torch import nn

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.objectives.base import Rollout
from srpo_lightning.rewards import Reward
from tests import tiny

WORDS = ControlWords(["Detail", "Real", "Photo"], ["Painting", "Anime"])


class Recorder(Reward):
    """Scores every pair alike, and remembers what it was asked."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.asked: list[tuple[int, list[str]]] = []
        self.coefficients = torch.empty(0)

    def contrast(self, images, texts, coefficients):
        self.coefficients = coefficients
        return super().contrast(images, texts, coefficients)

    def forward(self, images, texts):
        self.asked.append((len(images), list(texts)))
        return images.mean((1, 2, 3)) * 0 + self.value


@pytest.fixture(scope="module")
def policy(models):
    return tiny.new_policy(models)


def rollout_of(policy, batch_size: int) -> Rollout:
    x0, noise = torch.randn(2, batch_size, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    return Rollout(x0, noise)


def test_the_constructor_holds_the_papers_constants():
    """The constants of the paper (arXiv 2509.06942) and its research code, with HPSv2.1."""
    defaults = {k: p.default for k, p in inspect.signature(SRPO).parameters.items() if k != "control_words"}
    assert defaults == {
        "word_choice": "cycle",
        "template": "{word}. {prompt}",
        "others": 0,
        "num_rollout_steps": 25,
        "rollout_guidance": 1.0,
        "guidance": 3.5,
        "shift": 3.0,
        "num_schedule_steps": 50,
        "window": (5, 25),
        "grid_size": 1000,
        "ground_truth_ratio": 0.9,
        "edge": 5,
        "denoise_lambda": (0.1, 0.25),
        "inversion_lambda": (0.3, 0.01),
        "margin": 0.7,
        "shared_noise": True,
        "position_per_sample": True,
        "reward_batch_size": None,
    }


def of(*prompts: str) -> Conditions:
    return tiny.new_conditions(len(prompts))._replace(prompts=list(prompts))


def test_words_cycle_with_the_step_each_side_at_its_own_length():
    objective = SRPO(WORDS)
    texts = [objective.texts(of("a cat"), Draws(0, step)) for step in range(6)]
    assert [positive[0] for positive, _ in texts] == ["Detail. a cat", "Real. a cat", "Photo. a cat"] * 2
    assert [negative[0] for _, negative in texts] == ["Painting. a cat", "Anime. a cat"] * 3


def test_a_random_word_is_a_function_of_seed_and_step_and_not_of_the_rank():
    objective = SRPO(WORDS, word_choice="random")
    drawn = [objective.texts(of("a"), Draws(0, step, rank=0)) for step in range(50)]
    assert drawn == [objective.texts(of("a"), Draws(0, step, rank=3)) for step in range(50)]
    assert drawn != [objective.texts(of("a"), Draws(1, step)) for step in range(50)]
    assert {positive[0] for positive, _ in drawn} == {"Detail. a", "Real. a", "Photo. a"}
    assert {negative[0] for _, negative in drawn} == {"Painting. a", "Anime. a"}


def test_the_template_places_word_and_prompt_and_leaves_their_braces_alone():
    objective = SRPO(ControlWords(["{x}"], ["y"]), template="{prompt}, {word}")
    assert objective.texts(of("a {b}", "c"), Draws(0)) == (["a {b}, {x}", "c, {x}"], ["a {b}, y", "c, y"])


def test_a_negative_prompt_stands_in_for_the_negative_word_of_its_own_prompt():
    conditions = of("a", "b")._replace(negative_prompts=[None, "blurry"])
    assert SRPO(WORDS).texts(conditions, Draws(0)) == (["Detail. a", "Detail. b"], ["Painting. a", "blurry"])


@pytest.mark.parametrize("per_sample", [False, True])
def test_positions_are_shared_by_the_ranks_and_by_the_batch_unless_asked_otherwise(per_sample):
    objective = SRPO(WORDS, position_per_sample=per_sample)
    steps = torch.stack([objective.positions(4, Draws(0, step)) for step in range(300)])
    assert torch.equal(steps[9], objective.positions(4, Draws(0, 9, rank=5))) != per_sample
    assert (len(steps[0].unique()) == 1) != per_sample
    assert steps.min() >= 5
    assert steps.max() <= 995
    assert steps.min() < 40
    assert steps.max() > 960


def test_the_rollout_follows_the_schedule_from_the_noise_it_returns(policy):
    objective, batch = SRPO(WORDS, num_rollout_steps=3), tiny.new_conditions(2)
    rollout = objective.rollout(policy, batch, Draws(0, 4, rank=1))
    assert torch.equal(rollout.noise, Draws(0, 4, rank=0).noise((2, *policy.latent_shape()), shared=True))
    with torch.no_grad():
        x0 = flow.integrate(lambda x, s: policy(x, s, batch, 1.0), rollout.noise, flow.schedule(3, 3.0))
    assert torch.equal(rollout.x0, x0)
    assert not rollout.x0.requires_grad


def test_offline_the_real_image_meets_fresh_noise_and_the_policy_is_not_asked():
    """Step 1's offline variant; a policy that is called would fail."""
    x0 = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))

    class Silent:
        def latent_shape(self, size):
            return 4, 16

    rollout = SRPO(WORDS).rollout(Silent(), tiny.new_conditions(2)._replace(x0=x0.bfloat16()), Draws(0, 4))
    assert torch.equal(rollout.x0, x0.bfloat16().float())
    assert torch.equal(rollout.noise, Draws(0, 4).noise((2, 4, 16), shared=True))


def test_noise_rollout_and_decoded_pictures_follow_the_size_of_the_batch(models, policy):
    """As a policy of that size of its own."""
    other = tiny.new_policy(models, height=48, width=16)
    batch, gradients = tiny.new_conditions(2), []
    for follows, conditions in ((policy, batch._replace(size=(48, 16))), (other, batch)):
        objective = SRPO(WORDS, num_rollout_steps=2)
        rollout = objective.rollout(follows, conditions, Draws(0))
        follows.zero_grad()
        objective.loss(follows, tiny.new_reward(models.clip), conditions, rollout, Draws(0)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in follows.transformer.parameters()]))
        assert rollout.x0.shape == (2, 3, 16)
    assert torch.equal(*gradients)
    policy.zero_grad()


def test_own_noise_differs_between_ranks_and_shared_noise_does_not(policy):
    batch = tiny.new_conditions(2)
    for shared in (True, False):
        objective = SRPO(WORDS, num_rollout_steps=1, shared_noise=shared)
        a, b = (objective.rollout(policy, batch, Draws(0, 4, rank)).noise for rank in (0, 1))
        assert torch.equal(a, b) == shared


def test_the_rollout_keeps_single_precision_whatever_precision_the_features_have(policy):
    batch = tiny.new_conditions(1)
    batch = batch._replace(text=batch.text.each(torch.Tensor.bfloat16))
    assert SRPO(WORDS, num_rollout_steps=1).rollout(policy, batch, Draws(0)).x0.dtype == torch.float32


def test_the_words_swap_in_the_inversion_branch(policy):
    """Step 4: denoising rewards positive against negative, inversion negative against positive."""
    reward = Recorder()
    SRPO(WORDS).loss(policy, reward, tiny.new_conditions(2), rollout_of(policy, 2), Draws(0, 0))
    positive, negative = ["Detail. a0 b", "Detail. a1 b"], ["Painting. a0 b", "Painting. a1 b"]
    assert reward.asked == [(4, positive * 2), (4, negative * 2)]
    denoising, inversion = reward.coefficients.split(2)
    assert (denoising[:, 0] > 1).all()
    assert (denoising[:, 1] == -1).all()
    assert (inversion[:, 0] == -1).all()
    assert (inversion[:, 1] > 1).all()


def test_the_reward_sees_no_more_images_at_once_than_asked(policy):
    reward = Recorder()
    SRPO(WORDS, reward_batch_size=3).loss(policy, reward, tiny.new_conditions(2), rollout_of(policy, 2), Draws(0, 0))
    assert [size for size, _ in reward.asked] == [3, 3, 1, 1]


@pytest.mark.parametrize(("value", "loss"), [(0.25, 0.45), (5.0, 0.0)])
def test_the_loss_is_a_hinge_at_the_margin(policy, value, loss):
    """relu(0.7 - r), with r = value for a relative reward that is `value` everywhere."""

    class Constant(Recorder):
        def contrast(self, images, texts, coefficients):
            return self(images, texts[0])

    outcome = SRPO(WORDS).loss(policy, Constant(value), tiny.new_conditions(2), rollout_of(policy, 2), Draws(0))
    assert outcome.loss.item() == pytest.approx(loss, abs=1e-6)
    assert outcome.scalars["reward_denoise"].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_reward_that_is_not_finite_poisons_the_whole_gradient(models, value):
    policy = tiny.new_policy(models)

    class Broken(Recorder):
        def contrast(self, images, texts, coefficients):
            scores = images.mean((1, 2, 3))
            return torch.cat([scores[:1] * 0 + value, scores[1:]])

    outcome = SRPO(WORDS).loss(policy, Broken(), tiny.new_conditions(2), rollout_of(policy, 2), Draws(0))
    assert not outcome.loss.isfinite()
    outcome.loss.backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert not nn.utils.get_total_norm(gradients).isfinite()


def test_the_score_is_the_mean_over_positive_words_minus_that_over_negative_words(models):
    reward, objective = tiny.new_reward(models.clip), SRPO(WORDS)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b"]
    one = [
        sum(float(reward(images[i : i + 1], [f"{w}. {prompts[i]}"])) for w in WORDS.positive) / 3
        - sum(float(reward(images[i : i + 1], [f"{w}. {prompts[i]}"])) for w in WORDS.negative) / 2
        for i in range(2)
    ]
    torch.testing.assert_close(objective.score(reward, images, prompts), torch.tensor(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"control_words": ControlWords([], ["a"])}, "control_words.positive is .*give at least one word"),
        ({"control_words": ControlWords(["a"], [" "])}, "control_words.negative is .*none of them empty"),
        ({"template": "{word}"}, "must contain {word} and {prompt}"),
        ({"window": (25, 5)}, "first step must come before its last"),
        ({"window": (5, 50)}, "before the end of the schedule, step 50"),
        ({"window": (0, 25)}, "start at 1"),
        ({"grid_size": 10}, "enlarge grid_size"),
        ({"ground_truth_ratio": 1.0}, "lower edge or ground_truth_ratio"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_cure(settings, cure):
    with pytest.raises(ValueError, match=cure):
        SRPO(**{"control_words": WORDS} | settings)
