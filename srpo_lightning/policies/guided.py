"""The velocity that a family is asked for: guided by an embedding, or by a second pass without a prompt."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from srpo_lightning.batch import Conditions, Size, Text
from srpo_lightning.policies import divided, loading
from srpo_lightning.policies.family import Family, Latents
from srpo_lightning.training.context import Context


@dataclass
class SparseGuidance:
    """Which steps of a rollout take the pass without a prompt.

    Its share of a guided velocity changes slowly from step to step, and matters little at low noise (Kynkaanniemi et
    al., arXiv 2404.07724; Dinh et al., arXiv 2408.11194).

    Args:
        every: Number of steps from one such pass to the next; those between keep its difference to the other pass.
        first: Number of steps that are guided, from the first on; None: all.
    """

    every: int = 1
    first: int | None = None
    _step: int = field(default=0, init=False, repr=False)
    _difference: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def is_whole(self) -> bool:
        """Whether every step has a pass of its own."""
        return self.every == 1 and self.first is None

    def forget(self) -> None:
        """Forget the last rollout."""
        self._step, self._difference = 0, None

    def unconditional(self, conditional: Latents, compute: Callable[[], Latents]) -> Latents | None:
        """The velocity without a prompt at the next step, which `compute` would give; None: it is not guided."""
        step, self._step = self._step, self._step + 1
        if self.first is not None and step >= self.first:
            return None
        if step % self.every == 0 or self._difference is None:
            found = compute()
            self._difference = conditional - found
            return found
        return conditional - self._difference


class Guided(Family):
    """A family with its velocity."""

    quantize_timesteps: bool
    exact_conditioning: bool
    rollout_cache: float | None
    trained_guidance: str
    sparse_guidance: SparseGuidance
    context: Context | None = None
    """Whose ranks have a part of the tokens each; None: this rank has all."""

    _is_rolling_out: bool = False

    def forward(self, x: Latents, sigma: Float[Tensor, " B"], conditions: Conditions, guidance: float) -> Latents:
        """The velocity at `x`, guided: by the model's embedding, or by a second pass, of no prompt, without gradient.

        Under autocast the level and the guidance that are told are rounded to its dtype, unless `exact_conditioning`.
        """
        assert self.transformer is not None, "load() comes first"
        conditional = self._pass(x, sigma, conditions.text, conditions.size, guidance, "prompt")
        is_alone = torch.is_grad_enabled() and self.trained_guidance == "conditional"
        if not self.has_negative or guidance == 1 or is_alone:
            return conditional
        assert conditions.unconditional is not None, "data encodes the text that guidance moves away from"
        none = conditions.unconditional.expand(conditions.batch_size)

        def second() -> Latents:
            return self._pass(x.detach(), sigma, none, conditions.size, guidance, "no prompt")

        with torch.no_grad():
            unconditional = (
                self.sparse_guidance.unconditional(conditional, second) if self._is_rolling_out else second()
            )
        return conditional if unconditional is None else self.guide(conditional, unconditional, guidance)

    def _pass(self, x: Latents, sigma: Tensor, text: Text, size: Size | None, guidance: float, kind: str) -> Latents:
        if self.quantize_timesteps:
            sigma = (sigma * 1000).trunc() / 1000
        told = [sigma, torch.full_like(sigma, guidance)] if self.guided else [sigma]
        text = Text({name: tensor.to(x.dtype) for name, tensor in text.tensors.items()}, text.lengths)
        with loading.own_cache(self.transformer, kind), self._told_exactly(told):
            return self._divided(x, sigma, text, size or self.size, told).to(x.dtype)

    def _divided(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """The velocity, whole on every rank of the group that computes it together."""
        if self.context is None:
            return self.network(x, sigma, text, size, told)
        degree = self.context.degree
        divided.check_picture(degree, size, self.num_tokens(size), self.cell)
        if divided.divides_text(self.transformer._cp_plan):
            text = divided.filled_up(text, degree, has_mask=self.masks_text)
        return self.context.leave(self.network(self.context.enter(x), sigma, text, size, told))

    def _told_exactly(self, told: list[Tensor]) -> AbstractContextManager[None]:
        if not self.exact_conditioning:
            return nullcontext()
        return loading.unrounded(self.transformer, [number.float() * self.rounded_unit for number in told])

    @property
    def guided(self) -> bool:
        """Whether the model embeds a distilled guidance (FLUX.1-dev does, FLUX.1-schnell does not)."""
        return bool(self.configs["transformer"].get("guidance_embeds", False))

    @property
    def has_negative(self) -> bool:  # type: ignore[override]  # a constant of other policies
        """Whether guidance takes a second pass: where no guidance is embedded and the family has a negative text."""
        return self.text_encoder.negative is not None and not self.guided

    @property
    def trains_as_it_samples(self) -> bool:  # type: ignore[override]  # a constant of other policies
        """Unless the pass of no prompt is left out of trained steps, or of some of a rollout's."""
        return not self.has_negative or (self.trained_guidance == "detached" and self.sparse_guidance.is_whole)

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """With the cache of features, if there is to be one, and as few passes without a prompt as asked for."""
        assert self.transformer is not None, "load() comes first"
        self._is_rolling_out = True
        if self.rollout_cache is not None:
            self.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=self.rollout_cache))
        try:
            yield
        finally:
            self._is_rolling_out = False
            self.sparse_guidance.forget()  # nothing is kept longer
            if self.rollout_cache is not None:
                self.transformer.disable_cache()
