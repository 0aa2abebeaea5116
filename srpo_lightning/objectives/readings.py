"""Whether a reward reads the texts that it is asked about to their end, and tells those apart that are contrasted."""

from collections.abc import Sequence
from heapq import nlargest
from itertools import product

from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.rewards.base import Reward

SAMPLED = 1000  # prompts whose lengths are looked at, evenly over the set
LONGEST = 64  # of which every pair of words is compared: what is cut before its word is long


def check_readings(form: RewardForm, reward: Reward, prompts: Sequence[str]) -> list[str]:
    """What of the texts a reward cuts off, in words.

    Args:
        form: makes texts of prompts.
        reward: loaded.
        prompts: to train on.

    Raises:
        ValueError: with a prompt and the cure, if positive and negative words are read alike under it.
    """
    lines = []
    for own, is_steered in reward.readers():
        if is_steered:
            for prompt in nlargest(LONGEST, prompts, key=len):
                _refuse_alike(form, own, prompt)
        looked_at = prompts[:: -(-len(prompts) // SAMPLED) or 1]
        cut = [prompt for prompt in looked_at if own.reading(form.texts_of(prompt)[0][0]).is_cut]
        if cut:
            lines.append(
                f"prompts: {len(cut)} of {len(looked_at)} looked at are cut to the {own.max_tokens} tokens that "
                f"{type(own).__name__} reads, first: {cut[0][:80]!r}"
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
