"""Cosine similarity of image and text under a CLIP model: CLIP score, HPSv2, PickScore and their kin."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from srpo_lightning.pretrained import read_json, unreadable_is_refused
from srpo_lightning.rewards.base import Images, Reward, Scores
from srpo_lightning.rewards.pixels import Preprocessing


class ClipReward(Reward):
    """Any transformers CLIPModel as a frozen reward.

    The score is the cosine of image and text, in [-1, 1], times the model's logit scale over `logit_scale_divisor`
    where one is given (SRPO uses HPSv2.1 as it is and PickScore with 20).

    Args:
        pretrained: a CLIPModel folder with its tokenizer, or a hub id.
        logit_scale_divisor: None leaves the cosine as it is.
        cache_size: how many texts' features are kept; at 1,024 numbers each the default takes 64 MiB.
    """

    def __init__(self, pretrained: str, logit_scale_divisor: float | None = None, cache_size: int = 16384) -> None:
        super().__init__()
        self.preprocessor = read_json(pretrained, "", "preprocessor_config.json")
        self.pretrained = pretrained
        self.logit_scale_divisor = logit_scale_divisor
        self.cache_size = cache_size
        self.clip: CLIPModel | None = None
        self._text_features: OrderedDict[str, Tensor] = OrderedDict()

    def load(self) -> None:
        """Read model, tokenizer and preprocessing, once."""
        if self.clip is not None:
            return
        with unreadable_is_refused(self.pretrained):
            self.tokenizer = CLIPTokenizer.from_pretrained(self.pretrained)
            clip = CLIPModel.from_pretrained(self.pretrained, dtype=torch.float32, use_safetensors=True)
        self.preprocess = Preprocessing.from_config(self.preprocessor, clip.config.vision_config.image_size)
        self.clip = clip.eval().requires_grad_(False)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """Cosine of each image with its text, scaled."""
        return self.scale * (self.image_features(images) * self.text_features(texts)).sum(-1)

    def relative(self, images: Images, positive: Sequence[str], negative: Sequence[str], weight: Scores) -> Scores:
        """`f . ((1 + weight) t_positive - t_negative)`: the image goes through CLIP once."""
        texts = self.text_features([*positive, *negative])
        direction = (1 + weight[:, None]) * texts[: len(positive)] - texts[len(positive) :]
        return self.scale * (self.image_features(images) * direction).sum(-1)

    def compare(self, images: Images, texts: Sequence[str]) -> Float[Tensor, "B T"]:
        """All pairs by one matrix product."""
        return self.scale * self.image_features(images) @ self.text_features(texts).T

    @property
    def scale(self) -> float:
        """What the cosine is multiplied by."""
        assert self.clip is not None, "load() comes first"
        if self.logit_scale_divisor is None:
            return 1.0
        return float(self.clip.logit_scale.exp()) / self.logit_scale_divisor

    @property
    def num_features(self) -> int:
        """E, the length of a feature vector."""
        assert self.clip is not None, "load() comes first"
        return int(self.clip.config.projection_dim)

    def image_features(self, images: Images) -> Float[Tensor, "B E"]:
        """Unit vectors, float32 (or the images' float64)."""
        assert self.clip is not None, "load() comes first"
        pixels = self.preprocess(images)
        features: Tensor = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return functional.normalize(features.to(images.dtype), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """Unit vectors, each distinct text computed once and kept."""
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
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
        device = self.clip.logit_scale.device
        # Features are kept for the whole run: they are computed in full precision whatever the trainer computes in, and
        # outside inference mode, whose tensors a later training step could not use.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            pooled = self.clip.text_model(**tokens.to(device)).pooler_output
            features: Tensor = self.clip.text_projection(pooled)
        return functional.normalize(features, dim=-1)[0]

    def _apply(self, *args: object, **kwargs: object) -> "ClipReward":
        """Features follow the model to another device or dtype by being computed anew."""
        before = {(p.device, p.dtype) for p in self.parameters()}
        super()._apply(*args, **kwargs)
        if before != {(p.device, p.dtype) for p in self.parameters()}:
            self._text_features.clear()
        return self
