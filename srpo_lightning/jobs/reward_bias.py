"""`reward-bias`: what a reward wants of a picture whatever the text says, and which form of it keeps that out.

A score R(x, p) is what it is partly because x shows p, partly because of x alone. Measured is the second part: what the
score of a picture under its own text has in common with its scores under the texts of other pictures. All shares are
ratios of products of independent texts, and so hold no bias from the finite number of texts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from jsonargparse.typing import PositiveInt
from torch import Tensor
from tqdm.auto import tqdm

from srpo_lightning.data.picture_files import LIMITS, Limits
from srpo_lightning.draws import keyed_generator
from srpo_lightning.evaluation.metrics import Interval
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.jobs.pictures import Picture, batches, read_pictures
from srpo_lightning.objectives.reward_forms import Pool, check_template
from srpo_lightning.picture_statistics import PICTURE_STATISTICS, luma
from srpo_lightning.rewards import Reward
from srpo_lightning.training.devices import chosen_device

SHARE = 0.25
"""The share of the gradient that all texts have in common, above which the plain form is advised against.

On the built-in model LeapAlign with `others` is ahead of the plain form by -.005 +- .027 on the judge where the share
is 0, .070 +- .048 at .56 and .164 +- .051 at .92 (docs/bias.md). On the line between, the gain at .25 is as large as
the interval at 0. SRPO's published form is ahead of the plain one from about .55.
"""

RESAMPLES = 2000


def contrast_of_luma(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Standard deviation of the luma over the pixels."""
    return luma(images).flatten(1).std(1)


DIRECTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    name: statistic.measure for name, statistic in PICTURE_STATISTICS.items()
} | {"contrast": contrast_of_luma}
"""What a common gradient is compared with."""


class Bias(NamedTuple):
    """What a reward's score and gradient owe to the picture alone.

    Args:
        score: Share of the variance of the pictures' own scores that their scores under other texts share.
        gradient: Share of the squared gradient of the own score that the gradients under other texts share.
        direction: Mean cosine of the common gradient with the gradient of each statistic of a picture.
        common: Share of the common gradient that each form of the reward still follows.
        subject: Share of the gradient of the own prompt, beyond what others have, that each form still follows.
    """

    score: Interval
    gradient: Interval
    direction: dict[str, Interval]
    common: dict[str, Interval]
    subject: dict[str, Interval]

    @property
    def advice(self) -> str:
        """Which form to take, in words."""
        part = f"{self.gradient.value:.0%} of the gradient is in all texts alike"
        strongest = max(self.direction, key=lambda name: abs(self.direction[name].value))
        pull = "more" if self.direction[strongest].value > 0 else "less"
        if self.gradient.value <= SHARE:
            return f"{part}: Plain follows the texts; a form that takes other prompts' scores off costs little either"
        return (
            f"{part}, and asks for {pull} {strongest} first: train by Relative with `others`, which takes it off and "
            "keeps the subject; Plain would follow it"
        )


class Measured(NamedTuple):
    """N pictures, each under its own text and those of others.

    Args:
        own: Scores [N] under the own texts.
        others: Mean scores [N] under the first half of the other texts, and under the second.
        products: Products of gradients by name, [N] each.
    """

    own: Float[Tensor, " N"]
    others: tuple[Float[Tensor, " N"], Float[Tensor, " N"]]
    products: dict[str, Float[Tensor, " N"]]


def reward_bias(
    reward: Reward,
    images: str,
    prompts: str,
    template: str = "{prompt}",
    words: str | None = None,
    others: PositiveInt = 8,
    batch_size: PositiveInt = 8,
    device: str = "auto",
    output: str | None = None,
    max_picture_megapixels: PositiveInt = LIMITS.megapixels,
    max_picture_megabytes: PositiveInt = LIMITS.megabytes,
) -> None:
    """Measure, on given pictures, what a reward model wants whatever the text says.

    Args:
        reward: Reward model, for instance `HPSv2` with `--reward.pretrained`.
        images: Folder of pictures, best such as training starts from.
        prompts: Prompt file whose lines follow the names of the pictures in order. A .jsonl may hold the keys `file`
            and `prompt` instead, as the samples and predictions of a run do.
        template: Text that the reward reads of a picture's own prompt, as in the form `Plain`.
        words: Control words as `positive/negative`; with them the published relative form is measured as well.
        others: Number of other pictures' prompts that each picture is scored under, twice.
        batch_size: Number of pictures scored at once.
        device: Device that scores: auto, cuda or cpu; auto takes a GPU if there is one.
        output: File in JSON for the numbers; null writes none.
        max_picture_megapixels: Megapixels of the largest picture that is decoded; larger ones are refused before.
        max_picture_megabytes: Megabytes of the largest picture file that is read; larger ones are refused before.

    Raises:
        ValueError: naming the cure, if pictures or prompts are missing or do not fit together, or no text is read.
    """
    check_template(template, "prompt")
    pair = parted(words)
    if not reward.reads_text:
        raise ValueError(
            f"{type(reward).__name__} reads no text: all of it is the picture's alone, and there is nothing to "
            "measure; weigh it as a term of WeightedReward"
        )
    if output and Path(output).expanduser().is_dir():
        raise ValueError(f"output is {output}, a folder: name a .json file")
    pictures = read_pictures(images, prompts, Limits(max_picture_megapixels, max_picture_megabytes, group=""))
    pool = Pool([picture.prompt for picture in pictures])
    if len(pool.prompts) < 3:
        raise ValueError(f"{prompts} has {len(pool.prompts)} different prompts: three is the least, better 30")
    chosen = chosen_device(device)
    reward.load()
    reward.requires_grad_(False).to(chosen)
    bias = summary(measure(reward, pictures, pool, template, pair, others, batch_size, chosen))
    report(bias, len(pictures), output)


def parted(words: str | None) -> tuple[str, str] | None:
    """A pair of control words.

    Raises:
        ValueError: if it is none.
    """
    if words is None:
        return None
    positive, _, negative = (part.strip() for part in words.partition("/"))
    if not positive or not negative:
        raise ValueError(f"--words is {words!r}: write a positive and a negative word as positive/negative")
    return positive, negative


def measure(
    reward: Reward,
    pictures: Sequence[Picture],
    pool: Pool,
    template: str,
    words: tuple[str, str] | None,
    others: int,
    batch_size: int,
    device: str,
) -> Measured:
    """Scores, and products of gradients in the pixels, of every picture.

    The gradient under other texts is taken twice, of different ones (c, d): products of the two hold no noise. Other
    prompts are read bare: what the template asks for is wanted, and no bias.
    """

    def columns(prompts: Sequence[str], half: int) -> list[list[str]]:
        """Prompts of others, a column each; the two halves of a picture's have none in common."""
        drawn = []
        for prompt in prompts:
            rest = [other for other in pool.prompts if other != prompt]
            order = torch.randperm(len(rest), generator=keyed_generator(0, 0, "reward-bias", prompt)).tolist()
            size = min(others, len(rest) // 2)
            drawn.append([rest[place] for place in order[half * size : (half + 1) * size]])
        return [list(column) for column in zip(*drawn, strict=True)]

    found: list[Measured] = []
    for images, prompts in tqdm(list(batches(pictures, batch_size)), desc="pictures", unit="batch"):
        pixels = images.to(device).requires_grad_()

        def gradient(*texts: Sequence[str], pixels: Tensor = pixels) -> tuple[Tensor, Tensor]:
            total, slopes = pixels.new_zeros(len(pixels)), torch.zeros_like(pixels)
            for column in texts:
                scores = reward(pixels, column)
                slopes += torch.autograd.grad(scores.sum(), pixels)[0] / len(texts)
                total += scores.detach() / len(texts)
            return total, slopes

        own, g = gradient([template.format(prompt=prompt) for prompt in prompts])
        _, s = gradient(prompts)
        (first, c), (second, d) = (gradient(*columns(prompts, half)) for half in (0, 1))
        forms = {"Plain": g, "Relative, others": g - c}
        if words:
            sides = [gradient([f"{word}. {prompt}" for prompt in prompts])[1] for word in words]
            forms["Relative"] = sides[0] - sides[1]
        products = {"g g": dot(g, g), "g c": (dot(g, c) + dot(g, d)) / 2}
        for name, form in forms.items():
            products |= {f"{name} d": dot(form, d), f"{name} subject": dot(form, s - d)}
        for name, statistic in DIRECTIONS.items():
            (slope,) = torch.autograd.grad(statistic(pixels).sum(), pixels)
            products[f"along {name}"] = torch.cosine_similarity((c + d).flatten(1), slope.flatten(1)).double()
        found.append(Measured(own, (first, second), products))
    return Measured(
        torch.cat([part.own for part in found]).cpu(),
        (torch.cat([part.others[0] for part in found]).cpu(), torch.cat([part.others[1] for part in found]).cpu()),
        {name: torch.cat([part.products[name] for part in found]).cpu() for name in found[0].products},
    )


def dot(one: Tensor, other: Tensor) -> Float[Tensor, " B"]:
    """The inner product of each picture's two gradients."""
    return (one * other).flatten(1).double().sum(1)


def summary(measured: Measured) -> Bias:
    """The shares, with 95 % intervals over resampled pictures."""
    p = measured.products
    own, rest = measured.own.double(), (measured.others[0] + measured.others[1]).double() / 2
    forms = [name.removesuffix(" d") for name in p if name.endswith(" d")]

    def score(rows: Tensor) -> Tensor:
        a, b = own[rows] - own[rows].mean(1, keepdim=True), rest[rows] - rest[rows].mean(1, keepdim=True)
        return (a * b).mean(1) / a.square().mean(1)

    def mean(name: str) -> Callable[[Tensor], Tensor]:
        return lambda rows: p[name][rows].mean(1)

    def ratio(over: str, under: str) -> Callable[[Tensor], Tensor]:
        return lambda rows: p[over][rows].mean(1) / p[under][rows].mean(1)

    return Bias(
        resampled(score, len(own)),
        resampled(ratio("g c", "g g"), len(own)),
        {name: resampled(mean(f"along {name}"), len(own)) for name in DIRECTIONS},
        {form: resampled(ratio(f"{form} d", "Plain d"), len(own)) for form in forms},
        {form: resampled(ratio(f"{form} subject", "Plain subject"), len(own)) for form in forms},
    )


def resampled(statistic: Callable[[Tensor], Tensor], count: int) -> Interval:
    """A statistic of all pictures, and its percentile interval over pictures that are drawn with replacement.

    Args:
        statistic: Function of row numbers [R, N] that gives [R].
        count: Number N of pictures.
    """
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(statistic(drawn), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(statistic(torch.arange(count)[None])), low, high)


def report(bias: Bias, count: int, output: str | None) -> None:
    """Print the shares and the advice, and write them if asked to."""

    def shown(interval: Interval) -> str:
        return f"{interval.value:6.2f}  [{interval.low:5.2f}, {interval.high:5.2f}]"

    print(f"{count} pictures, each under its own text and those of others; in brackets 95 % intervals\n")
    print(f"in all texts alike    of the score's variance {shown(bias.score)}")
    print(f"                      of the squared gradient {shown(bias.gradient)}\n")
    print("what that pulls at    cosine with the gradient of")
    for name, interval in bias.direction.items():
        print(f"{name:>44}  {shown(interval)}")
    print("\nleft of the gradient  in all texts alike          of the prompt's subject")
    for name in bias.common:
        left = shown(bias.common[name]) if bias.gradient.low > 0 else "there is none".ljust(22)
        print(f"{name:20}  {left}    {shown(bias.subject[name])}")
    print(f"\n{bias.advice}")
    if output:
        record = {"num_pictures": count, "advice": bias.advice} | {
            name: value._asdict() if isinstance(value, Interval) else {k: v._asdict() for k, v in value.items()}
            for name, value in bias._asdict().items()
        }
        with complete_or_absent(Path(output).expanduser()) as partial:
            partial.write_text(strict_json(record, 2), encoding="utf-8")
