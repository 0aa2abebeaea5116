"""What a reward model is: a frozen, differentiable judge of images under texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srpo_lightning.files.fingerprint import Recorded
from srpo_lightning.picture_statistics import mean_over_frames, over_frames
from srpo_lightning.rewards.words import WordList

Images: TypeAlias = Float[Tensor, "B 3 *F H W"]
"""Pictures [B, 3, H, W] in [0, 1]; for a reward that reads clips also frames of clips, [B, 3, F, H, W]."""

Scores: TypeAlias = Float[Tensor, " B"]


class Reading(NamedTuple):
    """What a reward reads of a text.

    Args:
        tokens: Tokens that were read; where they are equal, so is the score.
        is_cut: Whether the text has more tokens than were read.
    """

    tokens: Hashable
    is_cut: bool


class Reward(Recorded, nn.Module, ABC):
    """Scores images under texts; higher is better; differentiable with respect to the images.

    A reward of pictures scores the frames of a clip one by one, and their mean counts. One that declares `reads_clips`
    gets the frames of each sample together, [B, 3, F, H, W].

    A reward of your own needs `forward` alone. `load` is where large weights are read (the constructor stays cheap);
    whatever parameters it makes are frozen. `scores` is worth overriding where image features serve several texts.
    """

    reads_text: bool = True
    """Whether the text counts. Where it does not there is nothing to contrast, and SRPO alone cannot use the reward."""

    reads_clips: bool = False
    """Whether the reward compares frames, so that it gets those of a clip together; pictures it then refuses."""

    max_tokens: int | None = None
    """The most tokens of a text that are read, once the weights are; None: all of them."""

    word_lists: ClassVar[Mapping[str, WordList]] = MappingProxyType({})
    """Control words that steer this reward, to start from, by what they steer towards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(
            lambda own, args, kwargs: check_lengths(*args, **kwargs | {"clips": own.reads_clips}), with_kwargs=True
        )

    def load(self) -> None:
        """Read the weights, once; a second call does nothing."""

    @abstractmethod
    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The score of each image under its own text.

        Args:
            images: Pictures [B, 3, H, W] in [0, 1], or clips.
            texts: Texts, one for each picture.
        """

    def under(self, texts: Sequence[str]) -> Callable[[Images], Scores]:
        """The reward under these texts, as a function of pictures."""

        def scored(images: Images) -> Scores:
            scores: Scores = self(images, texts)
            return scores

        return scored

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """The score of each image under T texts of its own.

        Args:
            images: Pictures [B, 3, H, W] in [0, 1].
            texts: T columns of texts, each with one for each picture.
        """
        return torch.stack([self(images, column) for column in texts], dim=1)

    def contrast(self, images: Images, texts: Sequence[Sequence[str]], coefficients: Float[Tensor, "B T"]) -> Scores:
        """The weighted sum of each image's scores under T texts: what only the difference of texts can raise.

        Args:
            images: Pictures [B, 3, H, W] in [0, 1].
            texts: T columns of texts, each with one for each picture.
            coefficients: Coefficients [B, T] of the scores.

        Raises:
            ValueError: if the reward reads no text.
        """
        self.check_contrast()
        return (self.scores(images, texts) * coefficients).sum(1)

    def check_frames(self, num_frames: int) -> None:
        """Refuse to compare frames where there is one.

        Args:
            num_frames: Frames of a sample that a training step shows.

        Raises:
            ValueError: with the cure.
        """
        if self.reads_clips and num_frames < 2:
            raise ValueError(
                f"{type(self).__name__} compares frames of a clip, and training shows it pictures of one frame: set "
                "num_frames and num_rewarded_frames of a policy of clips above 1, or take this reward out"
            )

    def check_contrast(self) -> None:
        """Refuse to contrast texts that are not read."""
        if not self.reads_text:
            raise ValueError(
                f"{type(self).__name__} reads no text, so that no control words can steer by it: give it as a term of "
                "WeightedReward beside a reward that reads text, or to RewardTracking as a metric"
            )

    def plain(self, images: Images, prompts: Sequence[str]) -> Scores:
        """What the reward adds to its contrast whatever the control words are; nothing but in a WeightedReward."""
        return images.new_zeros(len(images))

    def compare(self, images: Images, texts: Sequence[str]) -> Float[Tensor, "B T"]:
        """The score of every image under every text."""
        return self.scores(images, [[text] * len(images) for text in texts])

    def reading(self, text: str) -> Reading:
        """What is read of a text; a reward whose `max_tokens` is a number says where it cuts."""
        return Reading(text, is_cut=False)

    def readers(self) -> list[tuple["Reward", bool]]:
        """The rewards in this one that read texts, and whether control words steer by them."""
        return [(self, True)] if self.reads_text else []

    def train(self, mode: bool = True) -> "Reward":
        """Stay in evaluation mode: a reward is frozen."""
        return super().train(False)


def seen_by(reward: Reward, images: Images, score: Callable[[Images], Tensor]) -> Tensor:
    """What a function of the reward finds in pictures; of clips the mean over frames, unless the reward reads clips.

    Args:
        reward: Reward that `score` asks.
        images: Pictures [B, 3, H, W] or clips [B, 3, F, H, W].
        score: Function that gives a number, or a row of them, for each picture or clip.
    """
    return score(images) if reward.reads_clips else mean_over_frames(images, score)


def evaluated_by(reward: Reward, images: Images, frames: Sequence[int], score: Callable[[Images], Tensor]) -> Tensor:
    """What an evaluation finds: of clips the mean over frames at equal distances, unless the reward reads clips.

    Args:
        reward: Reward that `score` asks.
        images: Pictures [B, 3, H, W] or whole clips [B, 3, F, H, W].
        frames: Frames that a reward that reads clips gets together.
        score: Function that gives a number, or a row of them, for each picture or clip.
    """
    return score(images[:, :, list(frames)]) if reward.reads_clips else over_frames(images, score)


def check_lengths(images: Tensor, texts: Sequence[str], clips: bool = False) -> None:
    """Refuse images and texts whose numbers differ, which broadcasting would let pass.

    Args:
        images: What is scored.
        texts: Its texts.
        clips: Whether clips are read.

    Raises:
        ValueError: if there is not one text for each image, or the images are no batch of RGB images.
    """
    if clips and (images.ndim != 5 or images.shape[1] != 3 or images.shape[2] < 2):
        raise ValueError(
            f"images are {list(images.shape)}: a reward that compares frames takes clips [B, 3, F, H, W] of two frames "
            "or more; give it a policy with num_frames and num_rewarded_frames above 1"
        )
    if not clips and (images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(f"images are {list(images.shape)}: a reward takes [B, 3, H, W]")
    if isinstance(texts, str) or len(texts) != len(images):
        count = "one string" if isinstance(texts, str) else f"{len(texts)} texts"
        raise ValueError(f"{count} for {len(images)} images: give a list with one text for each image")


def check_columns(images: Tensor, columns: Sequence[Sequence[str]]) -> None:
    """Refuse columns of texts whose lengths are not the number of images."""
    for texts in columns:
        check_lengths(images, texts)
