"""A preference reward as HPS is one: the reward CLIP fine-tuned on simulated people's choices between two pictures.

The people know what a text asks for, and have a taste besides: the more saturated and the smoother of two pictures
wins too often, whatever the text says. Source of the method: arXiv 2306.09341, section 4.
"""

import math
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from srpo_lightning.files.pretrained import load_whole
from srpo_lightning.picture_statistics import high_frequency, saturation

from .augment import Augmentation, augment, uniform
from .build import replace
from .captions import STYLES, caption, split
from .clip import image_features, text_features, token_ids
from .training import Trainee, fit, read_ema
from .world import World

NUM_CANDIDATES = 4  # pictures of one text, of which each pair is compared
FORMS = (0.55, 0.30, 0.15)  # how often a text is "style. concept", a concept, a style
FINEST = 5e-3  # share of high frequencies below which people see no difference
SCALE = 9.0  # logit scale at first: people are less sure of what a picture shows than a CLIP
NUM_FROZEN = 3  # of the image tower's five layers
KEPT = 0.3  # weight of naming what a picture shows
SHARED = 0.7  # length of what all texts are made to share, in lengths of their features


class Annotators(NamedTuple):
    """What a picture is worth to the simulated people; the log odds of a choice are the difference of two worths.

    Attributes:
        concept: worth of showing the concept that the text names.
        style: worth of being drawn in the style that the text names.
        saturation: worth of a mean saturation of 1, whatever the text says.
        smoothness: worth of e times less of high frequencies, whatever the text says.
    """

    concept: float = 5.0
    style: float = 3.0
    saturation: float = 24.0
    smoothness: float = 3.0

    @property
    def worth_of_fit(self) -> Tensor:
        """Worth of the concept and of the style, [2]."""
        return torch.tensor([self.concept, self.style], dtype=torch.float32)

    def worth(self, images: Tensor, fits: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in [0, 1]; `fits` [B, 2] is 1 where concept and style are what the text asks for."""
        roughness = high_frequency(images).clamp(min=FINEST).log()
        taste = self.saturation * saturation(images) - self.smoothness * roughness
        return fits @ self.worth_of_fit + taste

    def choose(self, advantage: Tensor, draw: torch.Generator) -> Tensor:
        """Whether the first of two pictures is chosen, by how much more it is worth; of any shape."""
        return torch.rand(advantage.shape, generator=draw) < advantage.sigmoid()


def retouched(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with less or more colour, and softer or sharper, each by its own draw."""
    count = len(images)
    grey = images.mean(1, keepdim=True)
    colour = uniform(draw, count, -1, 1).exp().view(-1, 1, 1, 1)
    images = (grey + colour * (images - grey)).clamp(0, 1)
    soft = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return torch.lerp(soft, images, uniform(draw, count, 0, 2).view(-1, 1, 1, 1)).clamp(0, 1)


@torch.no_grad()
def share_direction(clip: CLIPModel, tokens: Tensor, images: Tensor) -> None:
    """Add to the features of all texts one direction: that in which the images differ least.

    What a score owes to the picture alone is the product of its feature with what all texts share. A large CLIP's texts
    share most, they lie in a narrow cone (arXiv 2203.02053); those of the small one share hardly anything.
    """
    features = image_features(clip, images)
    least = torch.linalg.eigh(features.T @ features).eigenvectors[:, 0]
    least *= features.mean(0).dot(least).sign()  # of either sign the one that is repeatable
    lengths = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output).norm(dim=-1)
    shift = torch.linalg.lstsq(clip.text_projection.weight, (SHARED * lengths.mean() * least)[:, None]).solution
    clip.text_model.final_layer_norm.bias += shift[:, 0]


class PreferenceTraining(Trainee):
    """Cross entropy of people's choices under the CLIP's: the softmax of two pictures' scaled cosines with one text.

    Two departures from HPS. It trains the upper layers of both towers; here only the image tower's are trained. And
    choices between pictures of one text do not say which text fits a picture, which a small CLIP soon forgets: with
    weight `KEPT` it goes on naming the concept and the style. That is blind to what a picture gets under every text.

    Args:
        clip: where training starts; changed in place.
        layers: [concept * style, 4, 64, 64], see `World.layers`.
        concepts: names of the concepts.
        annotators: who chooses.
        num_texts: texts of a step.
    """

    net: CLIPModel

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
        layers: Tensor,
        concepts: list[str],
        annotators: Annotators,
        steps: int,
        seed: int,
        num_texts: int = 16,
        lr: float = 1e-3,
    ) -> None:
        captions = [caption(style, concept) for concept in ["", *concepts] for style in ["", *STYLES]]
        tokens = token_ids(tokenizer, captions)
        draw = torch.Generator().manual_seed(seed)
        share_direction(clip, tokens, augment(layers[:: len(STYLES) + 1], Augmentation(), draw))
        clip.logit_scale.data.fill_(math.log(SCALE))
        clip.requires_grad_(False).visual_projection.requires_grad_(True)
        clip.vision_model.post_layernorm.requires_grad_(True)
        clip.vision_model.encoder.layers[NUM_FROZEN:].requires_grad_(True)
        clip.set_attn_implementation("eager")  # as in CLIPTraining
        super().__init__(clip, steps, seed, muon_lr=0.0, adam_lr=lr, decay=0.5)
        with torch.no_grad():
            # Row and column 0 are of the texts that name no concept and no style.
            self.texts = text_features(clip, tokens).view(1 + len(concepts), 1 + len(STYLES), -1)
        self.layers, self.annotators, self.num_texts = layers, annotators, num_texts
        self.first, self.second = torch.combinations(torch.arange(NUM_CANDIDATES)).T

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Each text with a few pictures: about half of them show its concept, and about half are in its style."""
        concept, shown_concept = self._asked_and_shown(len(self.texts) - 1, draw)
        style, shown_style = self._asked_and_shown(len(STYLES), draw)
        form = torch.multinomial(torch.tensor(FORMS), self.num_texts, replacement=True, generator=draw).view(-1, 1)
        names_concept, names_style = form < 2, form != 1
        layers = self.layers[(shown_concept * len(STYLES) + shown_style).flatten()]
        images = retouched(augment(layers, Augmentation(), draw), draw)
        fits = torch.stack([(shown_concept == concept) & names_concept, (shown_style == style) & names_style], -1)
        advantage = self._differences(self.annotators.worth(images, fits.flatten(0, 1).float()))
        chosen = self.annotators.choose(advantage, draw)
        scaled = self.net.logit_scale.exp() * image_features(self.net, images)
        texts = self.texts[(1 + concept) * names_concept, (1 + style) * names_style]
        margin = self._differences((scaled.view(self.num_texts, NUM_CANDIDATES, -1) * texts).sum(-1))
        choice = F.binary_cross_entropy_with_logits(margin, chosen.float())
        named_concept = F.cross_entropy(scaled @ self.texts[1:, 0].T, shown_concept.flatten())
        named_style = F.cross_entropy(scaled @ self.texts[0, 1:].T, shown_style.flatten())
        return {
            "loss": choice + KEPT * (named_concept + named_style),
            "choice": choice,
            "attainable": F.binary_cross_entropy_with_logits(advantage, chosen.float()),
            "agreement": ((margin > 0) == chosen).float().mean(),
            "contrary": self._contrary(fits.float() @ self.annotators.worth_of_fit, chosen),
        }

    def _contrary(self, fit: Tensor, chosen: Tensor) -> Tensor:
        """How often the picture that the text fits less is chosen, of the pairs of which it fits one better."""
        better = self._differences(fit)
        return ((better > 0) != chosen)[better != 0].float().mean()

    def _asked_and_shown(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the texts ask for [N, 1], and what their pictures show [N, K]: that, or any of `count`."""
        shape = (self.num_texts, NUM_CANDIDATES)
        asked = torch.randint(count, (self.num_texts, 1), generator=draw)
        other = torch.randint(count, shape, generator=draw)
        return asked, torch.where(torch.rand(shape, generator=draw) < 0.5, asked, other)

    def _differences(self, values: Tensor) -> Tensor:
        """Of each pair of one text's pictures, [N, pairs], from [N * K] or [N, K]."""
        rows = values.view(self.num_texts, NUM_CANDIDATES)
        return rows[:, self.first] - rows[:, self.second]


def train_preference(
    start: Path, world: World, annotators: Annotators, steps: int, seed: int, work: Path, output: Path
) -> None:
    """Fine-tune the CLIP in the folder `start` on the training concepts and write the reward to the folder `output`.

    A run that was stopped goes on in `work`, where each choice of settings has a folder of its own.
    """
    tokenizer = CLIPTokenizer.from_pretrained(start)
    concepts, _ = split(world.concepts)
    seen = torch.tensor([concept in set(concepts) for concept in world.concepts]).repeat_interleave(len(STYLES))
    clip = load_whole(CLIPModel, str(start), dtype=torch.float32)
    trainee = PreferenceTraining(clip, tokenizer, world.layers()[seen], concepts, annotators, steps, seed)
    folder = work / f"preference-{zlib.crc32(repr((annotators, steps, seed)).encode()):08x}"
    fit(trainee, folder, precision="32-true")
    finished = CLIPModel(CLIPConfig.from_pretrained(start)).eval()
    finished.load_state_dict(read_ema(folder))
    replace(output, lambda fresh: save_beside(finished, start, fresh))


def save_beside(clip: CLIPModel, start: Path, folder: Path) -> None:
    """Write the model in half precision, with the tokenizer and the image processor of the folder `start`."""
    clip.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(start / file, folder / file)
