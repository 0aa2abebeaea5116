"""Cosine similarity of clip and text under an X-CLIP model: what happens in a clip, beside what is in its frames.

Source: arXiv 2208.02816, section 3, and transformers' XCLIPModel. Frames read each other through message tokens, a
small transformer joins their features, and each text is changed a little by the clip that it is compared with.
"""

from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from srpo_lightning.files.pretrained import load_whole, read_json
from srpo_lightning.picture_statistics import evenly
from srpo_lightning.rewards.base import Images, check_lengths
from srpo_lightning.rewards.clip import ClipReward
from srpo_lightning.rewards.words import WordList


class Seen(NamedTuple):
    """What X-CLIP makes of clips.

    Args:
        clip: Unit vector of each clip, [B, E].
        patches: Mean over frames of each patch, [B, N, E], which texts are changed by.
    """

    clip: Tensor
    patches: Tensor


class XClipReward(ClipReward):
    """Any transformers XCLIPModel as a frozen reward that reads clips; the cosine of clip and text, in [-1, 1].

    The model reads a fixed number of frames (8 in microsoft/xclip-base-patch32). Of clips with more, those at equal
    distances from the first to the last are read.
    """

    word_lists = MappingProxyType[str, WordList]({})
    reads_clips = True

    def read_model(self) -> Any:
        """The model with its weights."""
        return load_whole(transformers.XCLIPModel, self.pretrained, dtype=self.dtype)

    @cached_property
    def num_frames(self) -> int:
        """Frames that the model reads."""
        return int(read_json(self.pretrained, "", "config.json")["vision_config"].get("num_frames", 8))

    def check_frames(self, num_frames: int) -> None:
        """Refuse clips that are shorter than the model reads."""
        super().check_frames(num_frames)
        if num_frames < self.num_frames:
            raise ValueError(
                f"clips have {num_frames} frames, and {self.pretrained} reads {self.num_frames}: raise the policy's "
                "num_rewarded_frames (and num_frames) to that"
            )

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """Each clip goes through the model once, and each distinct text."""
        for column in texts:
            check_lengths(images, column, clips=True)
        assert self.clip is not None, "load() comes first"
        seen = self.seen(images)
        rows = torch.stack([self.text_features(column) for column in texts], dim=1)
        with torch.autocast(images.device.type, enabled=False):
            own = rows.to(self.clip.logit_scale.dtype)
            changed = own + self.clip.prompts_generator(own, seen.patches.to(own.dtype))
            cosines = torch.einsum("be,bte->bt", seen.clip, functional.normalize(changed.to(seen.clip.dtype), dim=-1))
        return self.scale * cosines

    def image_features(self, images: Images) -> Float[Tensor, "B E"]:
        """Unit vectors of the clips, in float32 (or their float64)."""
        return self.seen(images).clip

    def seen(self, images: Images) -> Seen:
        """What the model makes of clips [B, 3, F, H, W].

        Raises:
            ValueError: if they have fewer frames than the model reads.
        """
        model: Any = self.clip
        self.check_frames(images.shape[2])
        frames = images[:, :, evenly(self.num_frames, images.shape[2])].transpose(1, 2).flatten(0, 1)
        pixels = self.preprocess(frames)
        vision = model.vision_model(pixel_values=pixels.to(model.dtype))
        each = model.visual_projection(vision.pooler_output).unflatten(0, (len(images), -1))
        clip = model.mit(each).pooler_output
        patches = model.prompts_visual_layernorm(vision.last_hidden_state[:, 1:]) @ model.prompts_visual_projection
        patches = patches.unflatten(0, (len(images), -1)).mean(1)
        return Seen(functional.normalize(clip.to(pixels.dtype), dim=-1), patches)

    def normalized(self, features: Tensor) -> Tensor:
        """Of texts as they are: the clip changes them before they are compared."""
        return features
