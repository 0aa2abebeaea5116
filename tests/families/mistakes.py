"""Mistakes that several families could make, each in a class made from the family's."""

from collections.abc import Callable

from torch import Tensor

from srpo_lightning.batch import Text
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.packing import unpack


def wrong_sign(policy: type[FlowPolicy]) -> type[FlowPolicy]:
    class WrongSign(policy):
        def network(self, *arguments):
            return -super().network(*arguments)

    return WrongSign


def told(policy: type[FlowPolicy], level: Callable[[Tensor], Tensor]) -> type[FlowPolicy]:
    """The transformer is told another number than the noise level."""

    class ToldAnotherLevel(policy):
        def network(self, x, sigma, *arguments):
            return super().network(x, level(sigma), *arguments)

    return ToldAnotherLevel


def reading(policy: type[FlowPolicy], change: Callable[[Text], Text]) -> type[FlowPolicy]:
    """The transformer reads other features than the encoder has made."""

    class ReadingAnotherText(policy):
        def network(self, x, sigma, text, *arguments):
            return super().network(x, sigma, change(text), *arguments)

    return ReadingAnotherText


def without_mask(policy: type[FlowPolicy]) -> type[FlowPolicy]:
    """Padding counts as text."""
    return reading(policy, lambda text: text._replace(lengths=None))


def unshifted(policy: type[FlowPolicy]) -> type[FlowPolicy]:
    class Unshifted(policy):
        def shift_for(self, num_steps, size):
            return 1.0

    return Unshifted


def pipelines_scale(policy: type[FlowPolicy]) -> type[FlowPolicy]:
    """Guidance in the convention in which 0 is none."""

    class PipelinesScale(policy):
        def guide(self, conditional, unconditional, guidance):
            return super().guide(conditional, unconditional, guidance - 1)

    return PipelinesScale


def another_packing(policy: type[FlowPolicy]) -> type[FlowPolicy]:
    """The channels of a cell's place are together."""

    class AnotherPacking(policy):
        def to_vae(self, vae, latents, size):
            batch_size, num_tokens, channels = latents.shape
            turned = latents.view(batch_size, num_tokens, 4, channels // 4).mT.flatten(2)
            return super().to_vae(vae, turned, size)

    return AnotherPacking


def without_statistics(policy: type[FlowPolicy]) -> type[FlowPolicy]:
    """Latents are decoded without the VAE's mean and deviation."""

    class WithoutStatistics(policy):
        def to_vae(self, vae, latents, size):
            return unpack(latents, size)

    return WithoutStatistics
