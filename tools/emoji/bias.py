"""How much of a reward is the picture's alone, and what it likes there: the table that `preference` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from srpo_lightning.picture_statistics import high_frequency, saturation
from srpo_lightning.rewards import ClipReward, Reward

from . import vae
from .augment import TEST, augment
from .captions import STYLES, split
from .evaluate import Critic, draw, percent, read_pipeline
from .world import World

ASCENT_STEPS, ASCENT_LENGTH = 15, 0.64  # length of a step: Euclidean, over all latents of a picture


class Liking(NamedTuple):
    """What a reward likes in pictures, whatever the text says.

    Attributes:
        share: part of the variance of scores over pictures x texts that is the pictures' alone, in [0, 1].
        with_saturation: correlation of a picture's mean score with its saturation.
        with_high_frequency: the same with its share of high frequencies.
    """

    share: float
    with_saturation: float
    with_high_frequency: float

    @classmethod
    @torch.no_grad()
    def of(cls, reward: Reward, images: Tensor, texts: Sequence[str]) -> "Liking":
        """Measured on the scores of all images [B, 3, H, W] in [0, 1] under all texts."""
        scores = reward.compare(images, texts)
        own = scores.mean(1)
        return cls(
            float(own.var(correction=0) / scores.var(correction=0)),
            correlation(own, saturation(images)),
            correlation(own, high_frequency(images)),
        )


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of [N] with [N]."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def ascended(reward: Reward, autoencoder: AutoencoderKL, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in [0, 1], autoencoded, and what they become where the gradient of the scores is climbed.

    The latents are what moves, as they are what a policy moves. On bare pixels any CLIP's gradient is grain first.
    """
    latents = start = vae.encode(autoencoder, images)
    for _ in range(ASCENT_STEPS):
        latents = latents.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(vae.decode(autoencoder, latents), texts).sum(), latents)
        latents = latents + ASCENT_LENGTH * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        return vae.decode(autoencoder, start), vae.decode(autoencoder, latents)


@torch.no_grad()
def gains(reward: Reward, images: Tensor, texts: Sequence[str]) -> tuple[float, float]:
    """What 1.3 times the colour, and the mean of 3 x 3 pixels, add to the scores of images [B, 3, H, W] in [0, 1]."""
    grey = images.mean(1, keepdim=True)
    vivid = (grey + 1.3 * (images - grey)).clamp(0, 1)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    own = reward(images, texts)
    return float((reward(vivid, texts) - own).mean()), float((reward(soft, texts) - own).mean())


def bias_table(folders: Sequence[Path], assets: Path, world: World) -> str:
    """Bias and discrimination of CLIP rewards side by side, in Markdown.

    Pictures to score are drawn by the built-in model at guidance 2 for the evaluation prompts; texts are these prompts
    under "3d". Accuracy is measured on real drawings of these prompts, freshly moved and on fresh grounds.
    """
    _, prompts = split(world.concepts)
    pipeline = read_pipeline(assets / "emoji-flux")
    drawn = draw(pipeline, prompts, guidance=2.0, seed=0)
    columns = [column(folder, pipeline.vae.requires_grad_(False), drawn, prompts, world) for folder in folders]
    lines = [f"| measured | {' | '.join(folder.name for folder in folders)} |", "|---" * (1 + len(folders)) + "|"]
    lines += [f"| {name} | {' | '.join(cells[name] for cells in columns)} |" for name in columns[0]]
    return "\n".join(lines)


def column(folder: Path, autoencoder: AutoencoderKL, drawn: Tensor, prompts: list[str], world: World) -> dict[str, str]:
    """One reward's numbers by what they are."""
    reward = ClipReward(str(folder))
    reward.load()
    texts = [f"3d. {prompt}" for prompt in prompts]
    liking = Liking.of(reward, drawn, texts)
    vivid, soft = gains(reward, drawn, texts)
    climb = ascended(reward, autoencoder, drawn, texts)
    place = torch.arange(len(world.concepts) * len(STYLES))
    held_out = torch.isin(place // len(STYLES), torch.tensor([world.concepts.index(prompt) for prompt in prompts]))
    place = place[held_out]
    real = augment(world.layers()[held_out], TEST, torch.Generator().manual_seed(1234))
    style, top1, top5 = Critic(folder, world.concepts).accuracy(real, place % len(STYLES), place // len(STYLES))
    return {
        "variance of the score that is the picture's alone": f"{liking.share:.2f}",
        "correlation of that with saturation": f"{liking.with_saturation:.2f}",
        "correlation of that with high frequencies": f"{liking.with_high_frequency:.2f}",
        "score gained by 1.3 times the colour": f"{vivid:+.3f}",
        "score gained by a blur of 3 x 3 pixels": f"{soft:+.3f}",
        "saturation before / after ascent in latents": " / ".join(f"{saturation(x).mean():.3f}" for x in climb),
        "high frequencies before / after": " / ".join(f"{high_frequency(x).mean():.4f}" for x in climb),
        "held-out concepts: style": percent(style),
        "held-out concepts: concept top-1 / top-5": percent(top1, top5),
    }
