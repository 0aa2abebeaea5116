"""What is asked of the reward model about pictures: independent of how the gradient then reaches the policy.

`Plain` is `R(image, prompt)`; `Relative` is SRPO's `(1 + lambda) R(image, positive) - R(image, negative)` (arXiv
2509.06942), or that with the texts of other prompts in the negative place.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from jsonargparse.typing import NonNegativeInt
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws, keyed_generator
from srpo_lightning.files.fingerprint import Recorded
from srpo_lightning.rewards.base import Reward


class RewardForm(Recorded, ABC):
    """One number per picture, from one reward model."""

    @abstractmethod
    def __call__(
        self,
        reward: Reward,
        images: Tensor,
        conditions: Conditions,
        draws: Draws,
        weight: Float[Tensor, " B"] | None = None,
        signs: Sequence[int] | None = None,
    ) -> Float[Tensor, " B"]:
        """What a training step rewards.

        Args:
            reward: Reward model.
            images: Pictures [B, 3, H, W] in [0, 1], differentiable.
            conditions: Conditions that these pictures were drawn under.
            draws: Random numbers of the step.
            weight: Lambda of each picture, where the estimator has its own; only relative forms read it.
            signs: Number 1 for each picture to reward, -1 for each to penalise; None rewards all.
        """

    @abstractmethod
    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """What the form rewards in finished pictures, without chance."""

    def texts_of(self, prompt: str) -> tuple[list[str], list[str]]:
        """All texts that the reward may read of a prompt: those to move towards, and those to move away from."""
        return [prompt], []

    def prepare(self, prompts: Sequence[str]) -> None:  # most forms need none
        """Take note of all training prompts, before training."""

    def check(self, reward: Reward) -> None:  # most forms take any
        """Refuse a reward that the form cannot use."""


@dataclass
class Plain(RewardForm):
    """The reward of a picture under its own prompt.

    Args:
        template: Text that the reward reads; "3d. {prompt}" asks for a word without contrasting it with any.
    """

    template: str = "{prompt}"

    def __post_init__(self) -> None:
        """Refuse a template without the prompt."""
        check_template(self.template, "prompt")

    def __call__(
        self,
        reward: Reward,
        images: Tensor,
        conditions: Conditions,
        draws: Draws,
        weight: Float[Tensor, " B"] | None = None,
        signs: Sequence[int] | None = None,
    ) -> Float[Tensor, " B"]:
        """The score under the prompt; its sign is turned where the picture is penalised."""
        return _signs(signs, images) * self.score(reward, images, conditions.prompts)

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """The score under the prompt."""
        scores: Tensor = reward(images, [self.template.format(prompt=prompt) for prompt in prompts])
        return scores

    def texts_of(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt in its template."""
        return [self.template.format(prompt=prompt)], []


def check_template(template: str, *names: str) -> None:
    """Refuse a template that lacks one of the names in braces, or has others.

    Raises:
        ValueError: naming what it must contain.
    """
    expected = " and ".join(f"{{{name}}}" for name in names)
    try:
        template.format(**dict.fromkeys(names, ""))
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(f"template is {template!r}: in braces it may have {expected} alone ({error})") from error
    if not all(f"{{{name}}}" in template for name in names):
        raise ValueError(f"template is {template!r}: it must contain {expected}")


@dataclass
class ControlWords:
    """The words that steer: put before a prompt, they say what to move towards and what away from.

    Args:
        positive: Words to move towards, for instance Natural-lighting, Detail, Detailed, Real.
        negative: Words to move away from, for instance Concept art, Painting, Anime, Flat, Oil.
    """

    positive: list[str]
    negative: list[str]


@dataclass(kw_only=True)
class Wording:
    """Control words, and how they meet prompts.

    Args:
        control_words: Words that steer, the positive and the negative ones.
        word_choice: Order of the words: one after the other, step by step, or drawn at random.
        template: Text of a prompt under a word.
        others: Number of other training prompts whose mean score under the negative word is taken off, in the place of
            the picture's own prompt. 0 is the published form, in which the subject cancels with the reward's bias. With
            others the negative words may be none.
    """

    control_words: ControlWords = field(kw_only=False)
    word_choice: Literal["cycle", "random"] = "cycle"
    template: str = "{word}. {prompt}"
    others: NonNegativeInt = 0


@dataclass(kw_only=True)
class Relative(Wording, RewardForm):
    """SRPO's semantic relative reward, `(1 + lambda) R(image, positive) - R(image, negative)` (arXiv 2509.06942).

    With `others` = m it is `(1 + lambda) R(image, "word. p") - mean of m R(image, "negative word. q")`: the m prompts q
    are drawn from all training prompts but p. What no text explains cancels; what p alone explains stays. This form is
    ours, not the paper's.

    Args:
        extra_weight: Weight lambda of the positive text, where the estimator brings none of its own.

    Raises:
        ValueError: if a side has no words, a word is on both, or the template lacks word or prompt.
    """

    extra_weight: float = 0.1

    def __post_init__(self) -> None:
        """Refuse words that cannot steer."""
        for side, words in vars(self.control_words).items():
            may_be_none = side == "negative" and self.others
            if not (words or may_be_none) or not all(word.strip() for word in words):
                raise ValueError(f"control_words.{side} is {words}: give at least one word, none of them empty")
        negative = {word.strip().casefold() for word in self.control_words.negative}
        both = [word for word in self.control_words.positive if word.strip().casefold() in negative]
        if both:
            raise ValueError(
                f"control_words has {', '.join(both)} as positive and as negative: with itself a word has no contrast "
                "and nothing to train towards; leave it out on one side"
            )
        check_template(self.template, "word", "prompt")
        self._pool = Pool(())

    def prepare(self, prompts: Sequence[str]) -> None:
        """Keep the prompts that others are drawn from.

        Raises:
            ValueError: if there is but one.
        """
        self._pool = Pool(prompts if self.others else ())
        if self.others and len(self._pool.prompts) < 2:
            raise ValueError(
                f"others is {self.others}, but there is but one training prompt: give more prompts, or set it to 0"
            )

    def __call__(
        self,
        reward: Reward,
        images: Tensor,
        conditions: Conditions,
        draws: Draws,
        weight: Float[Tensor, " B"] | None = None,
        signs: Sequence[int] | None = None,
    ) -> Float[Tensor, " B"]:
        """The relative reward under the step's words; they swap where the picture is penalised."""
        towards, *away = self.texts(conditions, draws)
        if weight is None:
            weight = images.new_full((len(images),), self.extra_weight)
        rewarded = torch.tensor(signs or [1] * len(images)).to(images.device, non_blocking=True) > 0
        positive = torch.where(rewarded, 1 + weight, -torch.ones_like(weight))
        negative = torch.where(rewarded, -torch.ones_like(weight), 1 + weight)
        coefficients = torch.stack([positive, *[negative / len(away)] * len(away)], dim=1)
        relative = reward.contrast(images, [towards, *away], coefficients)
        return relative + _signs(signs, images) * reward.plain(images, conditions.prompts)

    def texts(self, conditions: Conditions, draws: Draws) -> tuple[list[str], ...]:
        """The prompts under the step's positive word, and columns of texts to move away from.

        The one column holds the prompts under the negative word, or each of the m columns other prompts under it.
        A prompt's own negative prompt stands in the place of either.
        """
        positive = self._word(self.control_words.positive, "positive", draws)
        away = [conditions.prompts]
        if self.others:
            drawn = self._drawn(conditions.prompts, draws)
            away = [list(column) for column in zip(*drawn, strict=True)]
        if self.control_words.negative:
            negative = self._word(self.control_words.negative, "negative", draws)
            away = [self._under(negative, column) for column in away]
        if conditions.negative_prompts is not None:
            away = [
                [text if own is None else own for text, own in zip(column, conditions.negative_prompts, strict=True)]
                for column in away
            ]
        return self._under(positive, conditions.prompts), *away

    def _drawn(self, prompts: Sequence[str], draws: Draws) -> list[list[str]]:
        """Others of each prompt, by seed, step and prompt: the same however a step is divided, and for a whole group.

        Without `prepare`, as where memory is predicted, they are of the batch.
        """
        pool = self._pool if self._pool.prompts else Pool(prompts)
        return [
            pool.draw(prompt, self.others, keyed_generator(draws.seed, draws.step, "others", prompt))
            for prompt in prompts
        ]

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """The relative reward without lambda, averaged over all words."""
        positive, negative = self.control_words.positive, self.control_words.negative
        away = [self._under(word, prompts) for word in negative] or [list(prompts)]
        texts = [*(self._under(word, prompts) for word in positive), *away]
        shares = [1 / len(positive)] * len(positive) + [-1 / len(away)] * len(away)
        coefficients = torch.tensor(shares, device=images.device).expand(len(images), -1)
        return reward.contrast(images, texts, coefficients) + reward.plain(images, prompts)

    def texts_of(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt under each word."""
        positive, negative = self.control_words.positive, self.control_words.negative
        towards, away = ([self._under(word, [prompt])[0] for word in words] for words in (positive, negative))
        return towards, away

    def check(self, reward: Reward) -> None:
        """Refuse a reward that no words can steer."""
        reward.check_contrast()

    def _under(self, word: str, prompts: Sequence[str]) -> list[str]:
        return [self.template.format(word=word, prompt=prompt) for prompt in prompts]

    def _word(self, words: list[str], purpose: str, draws: Draws) -> str:
        if self.word_choice == "cycle":
            return words[draws.step % len(words)]
        return words[int(draws.integers(purpose, 0, len(words) - 1, 1, shared=True))]


class Pool:
    """Different prompts, to draw others from.

    Args:
        prompts: Prompts, each of which counts once.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(dict.fromkeys(prompts))
        self._places = {prompt: place for place, prompt in enumerate(self.prompts)}

    def draw(self, prompt: str, count: int, generator: torch.Generator) -> list[str]:
        """As many prompts, each any but this one with the same chance; where there is no other, this one."""
        last = len(self.prompts) - 1
        own = self._places.get(prompt, last + 1)
        places = torch.randint(max(last + (own > last), 1), (count,), generator=generator).tolist()
        return [self.prompts[min(place + (place >= own), last)] for place in places]


def _signs(signs: Sequence[int] | None, images: Tensor) -> Tensor | int:
    return 1 if signs is None else torch.tensor(signs).to(images, non_blocking=True)
