"""`control-words`: how strongly a reward model tells two words apart, measured on pictures."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from jsonargparse.typing import PositiveInt
from torch import Tensor
from tqdm.auto import tqdm

from srpo_lightning.data.picture_files import LIMITS, Limits
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.jobs.pictures import Picture, batches, read_pictures
from srpo_lightning.objectives.reward_forms import check_template
from srpo_lightning.rewards import Reward
from srpo_lightning.training.devices import chosen_device

INVENTED = ("Blorfy", "Quandish", "Trevolic", "Zumbral")  # words that no model has met

NO_AUC = "these tell how much a pair moves the score, not whether it means what you think: give --against for that"


class Pair(NamedTuple):
    """What a reward model makes of two words.

    Args:
        words: Pair as "positive/negative".
        contrast: Mean over the pictures of R(positive. prompt) - R(negative. prompt).
        spread: Standard deviation of that over the pictures; a contrast that is the same everywhere tells none apart.
        separation: Ratio of `spread` to that of pairs of invented words. About 1 is chance; more is strength, which
            need not be the right meaning.
        pull: Norm of the contrast's gradient in the pixels over that of the plain score's: what training feels.
        auc: Probability that a picture of `images` has a larger contrast than one of `against`; 0.5 is chance. It is
            the one measure of meaning.
    """

    words: str
    contrast: float
    spread: float
    separation: float
    pull: float
    auc: float | None


def control_words(
    reward: Reward,
    images: str,
    prompts: str,
    words: list[str] | None = None,
    against: str | None = None,
    against_prompts: str | None = None,
    template: str = "{word}. {prompt}",
    batch_size: PositiveInt = 8,
    device: str = "auto",
    output: str | None = None,
    max_picture_megapixels: PositiveInt = LIMITS.megapixels,
    max_picture_megabytes: PositiveInt = LIMITS.megabytes,
) -> None:
    """Measure, on given pictures, how strongly a reward model separates pairs of control words.

    Args:
        reward: Reward model, for instance `HPSv2` with `--reward.pretrained`.
        images: Folder of pictures.
        prompts: Prompt file whose lines follow the names of the pictures in order. A .jsonl may hold the keys `file`
            and `prompt` instead, as the samples and predictions of a run do.
        words: Pairs such as `[Real/Painting, Detailed/Flat]`; null takes all pairs of the reward's own word lists.
        against: Folder of pictures that the negative words should fit better than the positive ones.
        against_prompts: Prompt file of the pictures of `against`; null takes `prompts`.
        template: Text that joins a word and a prompt.
        batch_size: Number of pictures scored at once.
        device: Device that scores: auto, cuda or cpu; auto takes a GPU if there is one.
        output: File in JSON for the table; null writes none.
        max_picture_megapixels: Megapixels of the largest picture that is decoded; larger ones are refused before.
        max_picture_megabytes: Megabytes of the largest picture file that is read; larger ones are refused before.

    Raises:
        ValueError: naming the cure, if pictures, prompts or words are missing or do not fit together.
    """
    pairs, chosen = _pairs(reward, words), chosen_device(device)
    check_template(template, "word", "prompt")
    if output and Path(output).expanduser().is_dir():
        raise ValueError(f"output is {output}, a folder: name a .json file")
    limits = Limits(max_picture_megapixels, max_picture_megabytes, group="")
    kinds = [read_pictures(images, prompts, limits)]
    if against is not None:
        kinds.append(read_pictures(against, against_prompts or prompts, limits))
    reward.check_contrast()
    reward.load()
    reward.requires_grad_(False).to(chosen)

    invented = [(one, other) for one, other in product(INVENTED, INVENTED) if one < other]
    measured = [_measure(reward, kind, [*pairs, *invented], template, batch_size, chosen) for kind in kinds]
    table = _table(pairs, measured)
    table.sort(key=lambda pair: pair.separation if pair.auc is None else pair.auc, reverse=True)
    _report(table, torch.cat([kind.scores for kind in measured]), output)


class Measured(NamedTuple):
    """N pictures under P pairs of words.

    Args:
        scores: Scores [N] of the bare prompts.
        contrasts: Contrasts [N, P] of each picture and pair.
        pulls: Pulls [N, P] of each picture and pair.
    """

    scores: Float[Tensor, " N"]
    contrasts: Float[Tensor, "N P"]
    pulls: Float[Tensor, "N P"]


def _pairs(reward: Reward, words: Sequence[str] | None) -> list[tuple[str, str]]:
    if words is None:
        pairs = [p for known in reward.word_lists.values() for p in product(known.positive, known.negative)]
        if not pairs:
            raise ValueError(f"{type(reward).__name__} brings no word lists: name pairs, --words '[Real/Painting]'")
        return pairs
    if not words:
        raise ValueError("--words is []: name pairs, '[Real/Painting]', or leave it out for the reward's own")
    split = [tuple(part.strip() for part in pair.split("/")) for pair in words]
    for pair, parts in zip(words, split, strict=True):
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"--words has {pair!r}: write a positive and a negative word as positive/negative")
    return [(positive, negative) for positive, negative in split]


def _table(pairs: list[tuple[str, str]], measured: list[Measured]) -> list[Pair]:
    """A line of each pair, from pictures under them and under the pairs of invented words that follow."""
    contrasts = torch.cat([kind.contrasts for kind in measured])
    pulls = torch.cat([kind.pulls for kind in measured]).mean(0)
    spreads = contrasts.std(0)
    floor = spreads[len(pairs) :].square().mean().sqrt().clamp(min=torch.finfo(spreads.dtype).tiny)
    return [
        Pair(
            f"{positive}/{negative}",
            float(contrasts[:, i].mean()),
            float(spreads[i]),
            float(spreads[i] / floor),
            float(pulls[i]),
            _auc(measured[0].contrasts[:, i], measured[1].contrasts[:, i]) if len(measured) > 1 else None,
        )
        for i, (positive, negative) in enumerate(pairs)
    ]


def _measure(
    reward: Reward,
    pictures: Sequence[Picture],
    pairs: Sequence[tuple[str, str]],
    template: str,
    batch_size: int,
    device: str,
) -> Measured:
    parts = []
    waiting = list(batches(pictures, batch_size))
    for images, prompts in tqdm(waiting, desc="pictures", unit="batch"):
        pixels = images.to(device).requires_grad_()
        scores, gradients = _with_gradient(reward, pixels, [prompts], [1.0])
        floor = gradients.flatten(1).norm(dim=1)
        columns = []
        for pair in pairs:
            texts = [[template.format(word=word, prompt=prompt) for prompt in prompts] for word in pair]
            contrasts, gradients = _with_gradient(reward, pixels, texts, [1.0, -1.0])
            columns.append((contrasts, gradients.flatten(1).norm(dim=1) / floor))
        contrast_columns, pull_columns = zip(*columns, strict=True)
        parts.append(Measured(scores, torch.stack(contrast_columns, 1), torch.stack(pull_columns, 1)))
    return Measured(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _with_gradient(
    reward: Reward, pixels: Tensor, texts: Sequence[Sequence[str]], coefficients: Sequence[float]
) -> tuple[Tensor, Tensor]:
    weights = pixels.new_tensor(coefficients).expand(len(pixels), -1)
    values = reward.contrast(pixels, texts, weights)
    (gradients,) = torch.autograd.grad(values.sum(), pixels)
    return values.detach(), gradients


def _auc(positive: Float[Tensor, " N"], negative: Float[Tensor, " M"]) -> float:
    """Area under the ROC curve: the share of pairs in which the positive one is larger, ties counted half."""
    difference = positive[:, None] - negative
    return float((difference > 0).float().mean() + (difference == 0).float().mean() / 2)


def _report(table: Sequence[Pair], scores: Float[Tensor, " N"], output: str | None) -> None:
    width = max(len("words"), *(len(pair.words) for pair in table))
    print(f"{len(scores)} pictures; score of the bare prompt: mean {scores.mean():.4g}, std {scores.std():.4g}")
    print(f"{'words':{width}}  contrast    spread  separation    pull    AUC")
    for pair in table:
        auc = "" if pair.auc is None else f"{pair.auc:7.3f}"
        print(
            f"{pair.words:{width}}  {pair.contrast:8.4g}  {pair.spread:8.4g}  {pair.separation:10.2f}"
            f"  {pair.pull:6.2f}{auc}"
        )
    print("separation: spread over that of invented words; pull: gradient over the score's")
    print("AUC: 1 if the words tell the two folders apart, 0.5 if not" if table[0].auc is not None else NO_AUC)
    if output:
        record = {
            "num_pictures": len(scores),
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            "pairs": [pair._asdict() for pair in table],
        }
        with complete_or_absent(Path(output).expanduser()) as partial:
            partial.write_text(strict_json(record, 2), encoding="utf-8")
