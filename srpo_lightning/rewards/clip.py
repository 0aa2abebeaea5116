"""Cosine similarity of image and text under a CLIP model: CLIP score (arXiv 2104.08718), PickScore (arXiv 2305.01569).

The score is `cos(f(image), g(text))`, times `exp(logit scale) / divisor` where a divisor is given.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float
from jsonargparse.typing import NonNegativeInt, PositiveFloat
from torch import Tensor
from torch.nn import functional

from srpo_lightning.files.pretrained import load_whole, read_by, read_json
from srpo_lightning.rewards.base import Images, Reading, Reward, Scores, check_columns
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.words import PUBLISHED


class ClipReward(Reward):
    """Any transformers CLIPModel as a frozen reward; as it is, the CLIP score.

    The score is the cosine of image and text, in [-1, 1]. With a `logit_scale_divisor` it is multiplied by the model's
    logit scale over that. CLIPScore, arXiv 2104.08718, is 2.5 max(cosine, 0) under ViT-B/32.

    Args:
        pretrained: CLIPModel folder or hub id.
        processor: Folder or hub id with tokenizer and preprocessor_config.json; null looks for them in `pretrained`.
        logit_scale_divisor: Divisor of the logit scale that the cosine is multiplied by; null leaves the cosine as it
            is.
        dtype: Precision of the weights. Features are compared in float32 either way.
        cache_size: Number of texts whose features are kept; at 1,024 numbers each the default takes 64 MiB.
    """

    word_lists = PUBLISHED

    def __init__(
        self,
        pretrained: str,
        processor: str | None = None,
        logit_scale_divisor: PositiveFloat | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        cache_size: NonNegativeInt = 16384,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.processor = processor or pretrained
        self.logit_scale_divisor = logit_scale_divisor
        self.dtype = getattr(torch, dtype)
        self.cache_size = cache_size
        self.clip: transformers.CLIPModel | None = None
        self.preprocessor = self.read_preprocessor()
        self._text_features: OrderedDict[str, Tensor] = OrderedDict()

    def load(self) -> None:
        """Read the weights and the tokenizer, once."""
        if self.clip is not None:
            return
        self.tokenizer = self.read_tokenizer()
        clip = self.read_model()
        self.preprocess = self.preprocessing(clip.config.vision_config.image_size)
        self.clip = clip.to(self.dtype).eval().requires_grad_(False)

    def read_preprocessor(self) -> dict[str, object]:
        """The image processor's configuration; small, so that a wrong path is refused before anything is read."""
        return read_json(self.processor, "", "preprocessor_config.json")

    def preprocessing(self, image_size: int) -> Preprocessing:
        """How images of any size become the model's pixels."""
        return Preprocessing.from_config(self.preprocessor, image_size)

    def read_tokenizer(self) -> "transformers.CLIPTokenizer":
        """The tokenizer, from its files."""
        return read_by(transformers.CLIPTokenizer, self.processor)

    def read_model(self) -> "transformers.CLIPModel":
        """The model with its weights."""
        return load_whole(transformers.CLIPModel, self.pretrained, dtype=self.dtype)

    def clean(self, text: str) -> str:
        """What is done to a text before it is split into tokens: nothing but what the tokenizer does."""
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids between start and end of text, the last place kept for the end."""
        ids: list[int] = self.tokenizer(self.clean(text), truncation=True, max_length=self.max_tokens).input_ids
        return ids

    @property
    def max_tokens(self) -> int:  # type: ignore[override]  # the model's own
        """The length of the model's position table, start and end included."""
        assert self.clip is not None, "load() comes first"
        return int(self.clip.config.text_config.max_position_embeddings)

    def reading(self, text: str) -> Reading:
        """The tokens, and whether there are more."""
        ids = self.tokenizer(self.clean(text)).input_ids
        is_cut = len(ids) > self.max_tokens
        return Reading(tuple(self.tokenize(text) if is_cut else ids), is_cut)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The scaled cosine of each image with its text."""
        return self.scores(images, [texts])[:, 0]

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """Each image goes through CLIP once, and each distinct text."""
        check_columns(images, texts)
        row_of = {text: row for row, text in enumerate(dict.fromkeys(text for column in texts for text in column))}
        rows = torch.tensor([[row_of[text] for text in column] for column in texts], device=images.device)
        image_features, text_features = self.image_features(images), self.text_features(list(row_of))
        with torch.autocast(images.device.type, enabled=False):
            cosines = image_features @ text_features.to(image_features.dtype).T
        return self.scale * cosines.gather(1, rows.T)

    @property
    def scale(self) -> float:
        """What the cosine is multiplied by."""
        if self.logit_scale_divisor is None:
            return 1.0
        return self.logit_scale / self.logit_scale_divisor

    @property
    def logit_scale(self) -> float:
        """The model's own factor, about 100."""
        assert self.clip is not None, "load() comes first"
        return float(self.clip.logit_scale.exp())

    @property
    def num_features(self) -> int:
        """E, the length of a feature vector."""
        assert self.clip is not None, "load() comes first"
        return int(self.clip.config.projection_dim)

    def image_features(self, images: Images) -> Float[Tensor, "B E"]:
        """Unit vectors of the images, in float32 (or the images' float64)."""
        assert self.clip is not None, "load() comes first"
        pixels = self.preprocess(images)
        features: Tensor = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return functional.normalize(features.to(pixels.dtype), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """Unit vectors of the texts; each distinct one is computed once and kept."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._text_features]
        if missing:
            self._text_features.update((text, self._encode(text)) for text in missing)
        features = torch.stack([self._text_features[text] for text in texts])
        for text in dict.fromkeys(texts):
            self._text_features.move_to_end(text)
        while len(self._text_features) > self.cache_size:
            self._text_features.popitem(last=False)
        return features

    def _encode(self, text: str) -> Float[Tensor, " E"]:
        # Each text alone: beside others its features would differ in the last bit, and a resumed run, whose cache is
        # empty, would meet other ones together.
        assert self.clip is not None, "load() comes first"
        weight = self.clip.logit_scale
        tokens = torch.tensor([self.tokenize(text)], device=weight.device)
        # Features are kept for the whole run: they are computed as precisely as the weights allow, whatever the trainer
        # computes in, and outside inference mode, whose tensors a later training step could not use.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            pooled = self.clip.text_model(input_ids=tokens).pooler_output
            features: Tensor = self.clip.text_projection(pooled)
        return self.normalized(features.to(torch.promote_types(weight.dtype, torch.float32)))[0]

    def normalized(self, features: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """Text features as they are kept: unit vectors."""
        return functional.normalize(features, dim=-1)

    def _apply(self, *args: object, **kwargs: object) -> "ClipReward":
        """Features follow the model to another device or dtype by being computed anew."""
        before = {(p.device, p.dtype) for p in self.parameters()}
        super()._apply(*args, **kwargs)
        if before != {(p.device, p.dtype) for p in self.parameters()}:
            self._text_features.clear()
        return self


class PickScore(ClipReward):
    """PickScore v1: exp(logit scale) times the cosine, about 18 to 24.

    Source: arXiv 2305.01569, model yuvalkirstain/PickScore_v1. SRPO trains with `logit_scale_divisor` 20.

    Args:
        processor: Folder or hub id with tokenizer and preprocessor, which the model's page names and its folder lacks.
        logit_scale_divisor: Divisor of the logit scale; 1 is the published score, null leaves the cosine as it is.
        clamp: Whether bicubic overshoot is cut off, as in the published score, which resizes 8-bit pictures. The
            research code of SRPO, which resizes tensors, leaves it.
    """

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        logit_scale_divisor: PositiveFloat | None = 1.0,
        *,
        clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained, processor, logit_scale_divisor, **kwargs)
        self.clamp = clamp

    def preprocessing(self, image_size: int) -> Preprocessing:
        """What the processor's configuration says, with or without overshoot."""
        return super().preprocessing(image_size)._replace(clamp=self.clamp)
