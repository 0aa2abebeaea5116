"""What an objective, the module and the callbacks ask of a policy."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Size
from srpo_lightning.draws import Draws
from srpo_lightning.encoding import Encoder, Encoding
from srpo_lightning.files.fingerprint import Recorded
from srpo_lightning.training.context import Context

Shard: TypeAlias = Callable[[nn.Module, Iterable[nn.Module]], None]
"""Divides a model on the meta device over the ranks, block by block, and gives it memory, not yet filled."""


class Policy(Recorded, nn.Module, ABC):
    """A flow model that draws images from conditions.

    The constructor stores paths and numbers only; `load` reads the weights. Exactly the parameters that are trained
    require a gradient.
    """

    dtype: torch.dtype = torch.float32
    """The numbers that the weights are kept in."""

    def encoder(self, wanted: Encoding) -> Encoder:
        """Turns prompts and pictures into what `forward` reads; data calls it before any weights are read.

        Args:
            wanted: how, as data's settings say.
        """
        raise ValueError(f"{type(self).__name__} has no method `encoder`, by which data encodes prompts: give it one")

    def text_shapes(self, wanted: Encoding) -> dict[str, tuple[int, ...]]:
        """The largest shape of one prompt's features by name, without a tokenizer if possible."""
        return self.encoder(wanted).text.shapes

    num_frames: int = 1
    """Frames of what `decode` makes: clips [B, 3, F, H, W] where they are more than one, else pictures."""

    @property
    def shown_frames(self) -> Sequence[int]:
        """Frames that an evaluation shows to the training reward, if that reads clips: as many as training does."""
        return range(self.num_frames)

    has_negative: bool = False
    """Whether guidance takes a second pass, of the text that it moves away from."""

    trains_as_it_samples: bool = True
    """Whether the velocity of a trained step is that of a rollout, guidance included."""

    @abstractmethod
    def load(self, shard: Shard | None = None) -> None:
        """Read the weights, once; a second call does nothing.

        Args:
            shard: divide what is trained over the ranks, each of which reads its own part only.
        """

    def check_divided(self, degree: int, sizes: Sequence[Size], text: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse ranks that share samples, each with a part of the tokens, where `divide` could not have that.

        Args:
            degree: number of ranks that share a sample.
            sizes: of pictures; empty: the policy's own alone.
            text: the largest shape of one prompt's features by name.

        Raises:
            ValueError: naming the setting.
        """
        raise ValueError(
            f"trainer.strategy's context_parallel is {degree}, but {type(self).__name__} has no method `divide`, by "
            "which tokens are divided over ranks: set it to 1"
        )

    def divide(self, context: Context) -> None:
        """Compute a part of the tokens of every later pass, once the weights are there; other ranks do the rest."""
        raise NotImplementedError(f"{type(self).__name__} does not divide tokens")

    @abstractmethod
    def restart(self) -> None:
        """Give what is trained the values again that `load` gave it, in place."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"], conditions: Conditions, guidance: float
    ) -> Float[Tensor, "B *rest"]:
        """The velocity at latents `x` of noise level `sigma` (flow.py's convention), for the pictures' own size.

        Args:
            x: latents.
            sigma: noise level of each sample, from 1 (noise) to 0.
            conditions: prompts and what the policy reads of them.
            guidance: strength g of guidance: distilled into the model, or u + g (c - u) over a pass without the prompt.
        """

    @abstractmethod
    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """The shape of one sample's latents.

        Args:
            size: pixels of the picture, here and below; None is the policy's own.
        """

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B *rest"], size: Size | None = None) -> Float[Tensor, "B 3 H W"]:
        """Clean latents to images in [0, 1], differentiable."""

    def rewarded_pictures(
        self, latents: Float[Tensor, "B *rest"], size: Size | None, draws: Draws
    ) -> list[Float[Tensor, "B 3 H W"]]:
        """What a reward, which scores pictures, sees of clean latents, with gradient; of a clip some of its frames.

        Args:
            draws: randomness of the micro-batch.
        """
        return [self.decode(latents, size)]

    @abstractmethod
    def sigmas(self, num_steps: int, shift: float | None = None, size: Size | None = None) -> Float[Tensor, " N"]:
        """The schedule of an Euler sampler, `num_steps + 1` levels from 1 to 0, in float64.

        Args:
            shift: overrides the shift of the model's own scheduler.
        """

    def integrate(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        noise: Float[Tensor, "B *rest"],
        num_steps: int,
        size: Size | None = None,
    ) -> Float[Tensor, "B *rest"]:
        """Clean latents by the model's own sampler: Euler's steps, unless its pipeline draws by others.

        Args:
            velocity: called with latents and one noise level per sample.
            noise: latents at level 1.
            num_steps: calls of `velocity`.
        """
        return flow.integrate(velocity, noise, self.sigmas(num_steps, size=size))

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """Around a rollout of training: a policy may draw it faster and less exactly than its evaluation samples."""
        yield

    has_reference: bool = False
    """Whether `as_reference` works."""

    def as_reference(self) -> AbstractContextManager[None]:
        """The model as it was before training, without a copy of it, for as long as it lasts."""
        raise NotImplementedError(f"{type(self).__name__} keeps no reference")

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the architecture, so that a checkpoint of another policy is refused."""
