"""Two X-CLIP models on the same clips: the reward, and the judge that is never trained against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer, XCLIPConfig, XCLIPModel

from tools.emoji.augment import Augmentation, blurred, grounds, uniform
from tools.emoji.captions import STYLES
from tools.emoji.clip import MEAN, STD, Size, text_features, text_settings, token_ids
from tools.emoji.training import Trainee

from .captions import caption
from .motions import MOTIONS, NUM_FRAMES, SIZE_PX, layers_of, poses

FEATURES = 128


REWARD = Size(width=128, layers=4, patch_px=16, text_width=128)
JUDGE = Size(width=160, layers=4, patch_px=8, text_width=96)


def new_xclip(size: Size, tokenizer: CLIPTokenizer) -> XCLIPModel:
    """An untrained X-CLIP for 9 frames of 64 x 64; clips change no text, so that a score is a plain cosine."""
    vision = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "image_size": SIZE_PX,
        "patch_size": size.patch_px,
        "num_frames": NUM_FRAMES,
        "mit_hidden_size": FEATURES,
        "mit_intermediate_size": 4 * FEATURES,
        "mit_num_hidden_layers": 2,
        "mit_num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    config = XCLIPConfig(
        text_config=text_settings(size, tokenizer), vision_config=vision, projection_dim=FEATURES, prompt_layers=0
    )
    model = XCLIPModel(config)
    torch.nn.init.normal_(model.mit.position_embedding, std=0.02)
    return model


def clip_features(model: XCLIPModel, clips: Tensor) -> Tensor:
    """Unit features [B, 128] of clips [B, 3, F, 64, 64] in [0, 1]."""
    pooled = model.get_video_features((clips.transpose(1, 2) - MEAN) / STD).pooler_output
    return F.normalize(pooled.float(), dim=-1)


def augmented(layers: Tensor, settings: Augmentation, draw: torch.Generator) -> Tensor:
    """Clips [B, 3, F, 64, 64] in [0, 1], each on a ground and with faults that all of its frames share.

    Args:
        layers: moved icons with transparency, [B, F, 4, 64, 64].
        settings: how far clips are changed; where things are is a matter of their motion.
        draw: source of all that is random.
    """
    count, frames = layers.shape[:2]
    ground = grounds(count, SIZE_PX, settings, draw)[:, None]
    clips = layers[:, :, :3] + (1 - layers[:, :, 3:]) * ground
    clips = clips * uniform(draw, count * 3, 1 - settings.tint, 1 + settings.tint).view(count, 1, 3, 1, 1)
    if settings.blurred:
        together = blurred(clips.flatten(1, 2), settings, draw)  # all frames of a clip, or none
        clips = together.unflatten(1, (frames, 3))
    noise = torch.randn(clips.shape, generator=draw) * uniform(draw, count, 0, settings.noise).view(-1, 1, 1, 1, 1)
    return (clips + noise).clamp(0, 1).transpose(1, 2)


class XClipTraining(Trainee):
    """Each clip against all motions, all styles and all concepts, and against whole captions of the batch's concepts.

    Args:
        layers: [concept * style, 4, 64, 64], see `tools.emoji.world.World.layers`.
        concepts: names of the concepts.
    """

    net: XCLIPModel

    def __init__(
        self,
        model: XCLIPModel,
        tokenizer: CLIPTokenizer,
        layers: Tensor,
        concepts: list[str],
        steps: int,
        seed: int,
        augmentation: Augmentation,
        batch: int = 40,
    ) -> None:
        super().__init__(model, steps, seed, muon_lr=3e-3, adam_lr=1e-3)
        model.set_attn_implementation("eager")  # the backward of fused attention is slow on a CPU at these lengths
        self.layers, self.augmentation, self.concepts, self.batch = layers, augmentation, concepts, batch
        whole = [caption(style, concept, motion) for concept in concepts for style in STYLES for motion in MOTIONS]
        ids = token_ids(tokenizer, [*whole, *concepts, *STYLES, *MOTIONS])
        self.whole, self.bare, self.styles, self.motions = ids.split(
            [len(whole), len(concepts), len(STYLES), len(MOTIONS)]
        )

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """One clip of each of `batch` concepts, in any style and motion."""
        concept = torch.randperm(len(self.concepts), generator=draw)[: self.batch]
        count = len(concept)
        style = torch.randint(len(STYLES), (count,), generator=draw)
        motion = torch.randint(len(MOTIONS), (count,), generator=draw)
        picture = concept * len(STYLES) + style
        moved = layers_of(self.layers[picture], poses(motion, draw))
        clips = clip_features(self.net, augmented(moved, self.augmentation, draw))
        # Beside its own, captions that differ in the style or in the motion alone.
        others = torch.stack(
            [
                (style + 1 + torch.randint(len(STYLES) - 1, (count,), generator=draw)) % len(STYLES),
                (motion + 1 + torch.randint(len(MOTIONS) - 1, (count,), generator=draw)) % len(MOTIONS),
            ]
        )
        rows = torch.cat(
            [
                picture * len(MOTIONS) + motion,
                (concept * len(STYLES) + others[0]) * len(MOTIONS) + motion,
                picture * len(MOTIONS) + others[1],
            ]
        )
        texts = text_features(self.net, torch.cat([self.whole[rows], self.bare, self.styles, self.motions]))
        logits = clips @ texts.T * self.net.logit_scale.clamp(max=math.log(100)).exp()
        whole, bare, styles, motions = logits.split([len(rows), len(self.bare), len(STYLES), len(MOTIONS)], dim=1)
        own = torch.arange(count)
        loss = F.cross_entropy(whole, own, label_smoothing=0.05) + 0.25 * F.cross_entropy(whole[:, :count].T, own)
        for part, truth in ((bare, concept), (styles, style), (motions, motion)):
            loss = loss + F.cross_entropy(part, truth, label_smoothing=0.05)
        return {
            "loss": loss,
            "whole": (whole.argmax(1) == own).float().mean(),
            "concept": (bare.argmax(1) == concept).float().mean(),
            "style": (styles.argmax(1) == style).float().mean(),
            "motion": (motions.argmax(1) == motion).float().mean(),
        }
