"""What a rollout saves whose guidance leaves out passes without a prompt, and how far its pictures move.

python -m benchmarks.guidance [--repeats 3]

The built-in model knows the empty prompt. Here it is guided by a second pass, its embedded guidance left at 1.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Size, Text
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.draws import sample_noise
from srpo_lightning.encoding import Encoding
from srpo_lightning.policies.family import Latents
from srpo_lightning.policies.flux import FluxPolicy, FluxTextEncoder
from srpo_lightning.policies.guided import SparseGuidance
from srpo_lightning.rewards import ClipReward


class WithEmptyPrompt(FluxTextEncoder):
    """FLUX.1's text encoder, of whose texts guidance moves away from the empty one."""

    negative = ""


class TwoPasses(FluxPolicy):
    """FLUX.1 guided by a second pass."""

    text_encoder = WithEmptyPrompt
    has_negative = True

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """At the embedded guidance that changes nothing."""
        return super().network(x, sigma, text, size, [told[0], torch.ones_like(told[0])])


class Unguided(SparseGuidance):
    """Takes nothing over: a step between two passes is not guided at all."""

    def unconditional(self, conditional: Latents, compute: Callable[[], Latents]) -> Latents | None:
        """The second pass, or none."""
        step, self._step = self._step, self._step + 1
        return compute() if step % self.every == 0 else None


STEPS = 24
WAYS: dict[str, tuple[int, SparseGuidance]] = {
    "every step": (STEPS, SparseGuidance()),
    "every 2nd step, its difference kept": (STEPS, SparseGuidance(2)),
    "every 3rd step, its difference kept": (STEPS, SparseGuidance(3)),
    "every 4th step, its difference kept": (STEPS, SparseGuidance(4)),
    "every 2nd step, none between": (STEPS, Unguided(2)),
    "the first 12 steps": (STEPS, SparseGuidance(first=12)),
    "the first 6 steps": (STEPS, SparseGuidance(first=6)),
    "no step": (STEPS, SparseGuidance(first=0)),
    "every step of 18": (18, SparseGuidance()),
    "every step of 12": (12, SparseGuidance()),
}
"""Steps, and which of them are guided."""


def main(repeats: PositiveInt = 3, batch_size: PositiveInt = 32, guidance: PositiveFloat = 3.5) -> None:
    """Print passes, seconds, the distance of pictures and the judge's score of the prompt; ways take turns.

    Args:
        repeats: turns.
        batch_size: prompts.
        guidance: strength.
    """
    policy = TwoPasses("srpo_lightning/assets/emoji-flux", 64, 64)
    judge = ClipReward("srpo_lightning/assets/emoji-judge")
    policy.load()
    judge.load()
    prompts = read_prompts("srpo_lightning/assets/prompts/eval.txt").prompts[:batch_size]
    encoder = policy.encoder(Encoding()).text
    text, none = (Text.collate(encoder.encode(texts)) for texts in (prompts, [""]))
    conditions = Conditions(prompts, text, torch.arange(len(prompts)), policy.size, unconditional=none)
    noise = sample_noise(0, range(len(prompts)), policy.latent_shape())
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    pictures: dict[str, Tensor] = {}
    passes: dict[str, int] = {}
    made: list[int] = []
    policy.transformer.register_forward_hook(lambda *_: made.append(1))
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, (num_steps, policy.sparse_guidance) in WAYS.items():
                made.clear()
                start = time.perf_counter()
                with policy.rolling_out():
                    latents = flow.integrate(
                        lambda x, sigma: policy(x, sigma, conditions, guidance), noise, policy.sigmas(num_steps)
                    )
                seconds[name].append(time.perf_counter() - start)
                passes[name], pictures[name] = len(made), policy.decode(latents)
        whole, full = median(seconds["every step"][1:]), pictures["every step"]
        print("| guided | passes | time | mean difference of pixels | judge |\n|---|---|---|---|---|")
        for name, drawn in pictures.items():
            spent = median(seconds[name][1:]) / whole
            distance, score = float((drawn - full).abs().mean()), float(judge(drawn, prompts).mean())
            print(f"| {name} | {passes[name]} | {spent:.2f} | {distance:.4f} | {score:.3f} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
