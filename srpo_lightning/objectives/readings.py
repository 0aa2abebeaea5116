"""Whether a reward reads texts to their end, and tells apart those that the relative reward contrasts."""

from collections.abc import Sequence
from heapq import nlargest
from itertools import product

from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.rewards.base import Reward

SAMPLED = 1000
"""Number of prompts whose lengths are looked at, evenly over the set."""

LONGEST = 64
"""Number of longest prompts under which every pair of words is compared: a prompt that hides its word is long."""


def check_readings(form: RewardForm, reward: Reward, prompts: Sequence[str]) -> list[str]:
    """What of the texts a reward cuts off: a line for each reward that cuts.

    Args:
        form: Form of the reward, which makes texts of prompts.
        reward: Reward with its weights loaded.
        prompts: Prompts to train on.

    Raises:
        ValueError: with a prompt and the cure, if positive and negative words are read alike under it.
    """
    lines = []
    for reader, is_steered in reward.readers():
        if is_steered:
            for prompt in nlargest(LONGEST, prompts, key=len):
                _refuse_alike(form, reader, prompt)
        looked_at = prompts[:: -(-len(prompts) // SAMPLED) or 1]
        cut = [prompt for prompt in looked_at if reader.reading(form.texts_of(prompt)[0][0]).is_cut]
        if cut:
            lines.append(
                f"prompts: {len(cut)} of {len(looked_at)} looked at are cut to the {reader.max_tokens} tokens that "
                f"{type(reader).__name__} reads, first: {cut[0][:80]!r}"
            )
    return lines


def _refuse_alike(form: RewardForm, reward: Reward, prompt: str) -> None:
    towards, away = ({text: reward.reading(text) for text in texts} for texts in form.texts_of(prompt))
    for positive, negative in product(towards, away):
        if towards[positive].tokens == away[negative].tokens:
            why = f" in its {reward.max_tokens} tokens" if towards[positive].is_cut else ""
            raise ValueError(
                f"{type(reward).__name__} reads no difference between control words{why}, so that nothing would be "
                f"trained, under the prompt {prompt[:80]!r} of {len(prompt)} letters: put {{word}} first in the "
                "template, shorten the prompt, or take other words"
            )
