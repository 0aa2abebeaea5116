"""Human Preference Score v2 and v2.1 (arXiv 2306.09341), and the metric that the SRPO paper derives from it.

The score is `cos(f(image), g(text))` under a fine-tuned CLIP ViT-H-14.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ftfy
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from srpo_lightning.files.pretrained import read_by, read_json, read_weights, weights_file
from srpo_lightning.rewards.base import Images
from srpo_lightning.rewards.clip import ClipReward
from srpo_lightning.rewards.open_clip import clip_model
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.words import PUBLISHED, SEMANTIC_GUIDED

FILENAME = "HPS_v2.1_compressed.pt"
NUM_HEADS = 16  # of ViT-H-14, image and text tower

TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Hub id of the tokenizer that the published file is read with, where no other is named."""


def is_converted(pretrained: str) -> bool:
    """Whether a path is of a folder that `convert` wrote."""
    return (Path(pretrained).expanduser() / "config.json").is_file()


class HPSv2(ClipReward):
    """HPSv2.1 (or v2): the cosine of image and text under a fine-tuned ViT-H-14, about 0.2 to 0.35.

    Source: arXiv 2306.09341; tgxs002/HPSv2, `hpsv2/img_score.py`; `fit` crop is what SRPO trains with.

    Args:
        pretrained: Published file, a folder that holds it or that `convert` wrote, or the hub id.
        filename: Name of the published file in the folder or on the hub, HPS_v2_compressed.pt for v2; refused where
            `pretrained` is a file, or what `convert` wrote.
        processor: Folder or hub id with CLIP's tokenizer; null takes the folder that `convert` wrote, or LAION's
            ViT-H-14.
        fit: Way to a square picture: crop the centre, as SRPO trains, or pad with black, as HPSv2 evaluates.
    """

    word_lists = MappingProxyType({**PUBLISHED, "realism (SGP-HPS)": SEMANTIC_GUIDED})

    def __init__(
        self,
        pretrained: str = "xswu/HPSv2",
        filename: str = FILENAME,
        processor: str | None = None,
        fit: Literal["crop", "pad"] = "crop",
        **kwargs: Any,
    ) -> None:
        self.is_converted = is_converted(pretrained)
        if processor is None:
            processor = pretrained if self.is_converted else TOKENIZER
        super().__init__(pretrained, processor, **kwargs)
        self.filename = filename
        self.fit = fit
        self._check_filename()
        if Path(pretrained).expanduser().exists() and not self.is_converted:
            weights_file(pretrained, filename)

    def _check_filename(self) -> None:
        file = Path(self.pretrained).expanduser()
        is_other = self.filename not in (FILENAME, file.name)
        if is_other and (self.is_converted or file.is_file()):
            what = "a folder that `convert` wrote, with weights of its own" if self.is_converted else "a file itself"
            raise ValueError(
                f"filename is {self.filename}, but pretrained is {what} ({file}): leave filename out, or name the "
                "folder that holds the published file"
            )

    def read_preprocessor(self) -> dict[str, object]:
        """Check the tokenizer's path, no more: the pixels are the same for every HPSv2."""
        return read_json(self.processor, "", "tokenizer_config.json")

    def preprocessing(self, image_size: int) -> Preprocessing:
        """Torchvision's Resize on tensors, which leaves the overshoot."""
        return Preprocessing((image_size, image_size), self.fit, half_even=True, clamp=False)

    def read_tokenizer(self) -> "transformers.CLIPTokenizer":
        """A special token that is spelt out in a prompt is text, as in open_clip."""
        return read_by(transformers.CLIPTokenizer, self.processor, split_special_tokens=True)

    def read_model(self) -> "transformers.CLIPModel":
        """The folder that `convert` wrote, or the published file."""
        if self.is_converted:
            return super().read_model()
        path = weights_file(self.pretrained, self.filename)
        return clip_model(read_weights(path), NUM_HEADS, path)

    def clean(self, text: str) -> str:
        """Mend broken unicode, resolve HTML entities, collapse white space, lower the case, as open_clip does."""
        return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class SGPHPS(HPSv2):
    """How HPSv2.1 prefers an image as "Realistic photo" to "CG Render": the probability, in [0, 1].

    A metric of the SRPO paper (arXiv 2509.06942, SGP-HPS; 0.41 to 0.51 there), because HPS itself hardly moves under
    SRPO. Its formula is not published: a softmax over the two scores, times the model's logit scale, is inferred from
    the published values. A Chinese rendering of the paper calls it the difference of the scores: take that with
    `as_probability: false`. The probability does not depend on `logit_scale_divisor`, the difference does.

    Args:
        as_probability: Whether the preference is the softmax's probability; false takes the difference of the scores.
    """

    def __init__(self, *, as_probability: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.as_probability = as_probability

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """The preference under each prompt."""
        (positive,), (negative,) = SEMANTIC_GUIDED.positive, SEMANTIC_GUIDED.negative
        pairs = [[f"{word}. {text}" for text in column] for column in texts for word in (positive, negative)]
        photo, render = super().scores(images, pairs).unflatten(1, (-1, 2)).unbind(2)
        if not self.as_probability:
            return photo - render
        return torch.sigmoid(self.logit_scale / self.scale * (photo - render))
