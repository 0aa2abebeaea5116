"""Two CLIP models on the same pictures: the reward, and the judge that is never trained against."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, XCLIPModel

from .augment import Augmentation, augment
from .captions import STYLES, caption
from .tokenizers import MAX_TOKENS
from .training import Trainee

MEAN, STD = 0.5, 0.5  # of CLIPImageProcessor, each channel


class Size(NamedTuple):
    """What differs between the two image towers; the text towers have two layers."""

    width: int
    layers: int
    patch_px: int
    text_width: int


REWARD = Size(width=160, layers=5, patch_px=8, text_width=128)
JUDGE = Size(width=192, layers=6, patch_px=16, text_width=96)


def text_settings(size: Size, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The text tower's part of a configuration."""
    return {
        "hidden_act": "gelu",
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": 4 * size.text_width,
        "num_hidden_layers": 2,
        "num_attention_heads": size.text_width // 32,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def new_clip(size: Size, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64 x 64 images and `MAX_TOKENS` tokens."""
    vision = {
        "hidden_act": "gelu",
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "image_size": 64,
        "patch_size": size.patch_px,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text_settings(size, tokenizer), vision_config=vision, projection_dim=128))


def image_features(clip: CLIPModel, images: Tensor) -> Tensor:
    """Unit features [B, 128] of images [B, 3, 64, 64] in [0, 1]."""
    pooled = clip.vision_model((images - MEAN) / STD).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def text_features(clip: CLIPModel | XCLIPModel, tokens: Tensor) -> Tensor:
    """Unit features [B, 128] of token ids [B, T]."""
    pooled = clip.text_model(input_ids=tokens).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids [N, T] of captions, padded to the longest: what follows the end token does not count."""
    ids: Tensor = tokenizer(captions, padding="longest", truncation=True, return_tensors="pt").input_ids
    return ids


class CLIPTraining(Trainee):
    """Each image against all concepts, against all styles, and against joint captions of the batch's concepts.

    Args:
        layers: [concept * style, 4, 64, 64], see `World.layers`.
        concepts: names of the concepts.
    """

    net: CLIPModel

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
        layers: Tensor,
        concepts: list[str],
        steps: int,
        seed: int,
        augmentation: Augmentation,
        batch_concepts: int = 48,
    ) -> None:
        super().__init__(clip, steps, seed, muon_lr=3e-3, adam_lr=1e-3)
        # The backward of fused attention is many times slower than plain attention on a CPU at these lengths.
        clip.set_attn_implementation("eager")
        self.layers, self.augmentation = layers, augmentation
        self.concepts, self.batch_concepts = concepts, batch_concepts
        joint = [caption(style, concept) for concept in concepts for style in STYLES]
        ids = token_ids(tokenizer, [*joint, *concepts, *STYLES])
        self.joint = ids[: len(joint)].view(len(concepts), len(STYLES), -1)
        self.bare, self.styles = ids[len(joint) : -len(STYLES)], ids[-len(STYLES) :]

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Two pictures of each of `batch_concepts` concepts, in two different styles."""
        picked = torch.randperm(len(self.concepts), generator=draw)[: self.batch_concepts]
        styles = torch.rand(len(picked), len(STYLES), generator=draw).argsort(1)[:, :2].flatten()
        rows = torch.arange(len(picked)).repeat_interleave(2)
        layers = self.layers[picked[rows] * len(STYLES) + styles]
        images = image_features(self.net, augment(layers, self.augmentation, draw))
        texts = text_features(self.net, torch.cat([self.joint[picked].flatten(0, 1), self.bare, self.styles]))
        logits = images @ texts.T * self.net.logit_scale.clamp(max=math.log(100)).exp()
        joint, bare, style = logits.split([len(picked) * len(STYLES), len(self.bare), len(STYLES)], dim=1)
        own = rows * len(STYLES) + styles
        # Which of its pictures a joint caption means: the other direction of the contrast.
        back = F.cross_entropy(joint.T[own], torch.arange(len(own)))
        of_joint = F.cross_entropy(joint, own, label_smoothing=0.05)
        of_bare = F.cross_entropy(bare, picked[rows], label_smoothing=0.05)
        of_style = F.cross_entropy(style, styles, label_smoothing=0.05)
        return {
            "loss": of_joint + of_bare + of_style + 0.25 * back,
            "joint": (joint.argmax(1) == own).float().mean(),
            "concept": (bare.argmax(1) == picked[rows]).float().mean(),
            "style": (style.argmax(1) == styles).float().mean(),
            "scale": self.net.logit_scale.exp(),
        }


def save_clip(clip: CLIPModel | XCLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write model, tokenizer and image processor as `transformers` reads them, in half precision."""
    clip.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(folder)
