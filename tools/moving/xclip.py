"""Two X-CLIP models on the same clips: the reward, and the judge that is never trained against."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, XCLIPConfig, XCLIPModel

from srpo_lightning.files.pretrained import load_whole
from tools.emoji.augment import Augmentation, blurred, grounds, uniform
from tools.emoji.captions import STYLES
from tools.emoji.clip import MEAN, STD, text_features, token_ids
from tools.emoji.tokenizers import MAX_TOKENS, new_clip_tokenizer
from tools.emoji.training import Trainee

from .captions import caption
from .motions import MOTIONS, NUM_FRAMES, SIZE_PX, layers_of, poses

WORDS = "text_model.embeddings.token_embedding.weight"
FEATURES = 128
"""Numbers in a feature, as in the two CLIP models of pictures."""

FRAME_SPREAD = 0.5
"""Standard deviation of what tells frames apart at first: features of pictures are about as large."""

MOTION_WEIGHT = 4
"""Of the motion's part of the loss: it is all that a CLIP of pictures does not know."""


def new_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's for these captions, the end token's number the highest: XCLIPModel reads a text where that is."""
    plain = new_clip_tokenizer(captions)
    vocab = plain.get_vocab()
    last = max(vocab, key=vocab.__getitem__)
    vocab[last], vocab[plain.eos_token] = vocab[plain.eos_token], vocab[last]
    merges = [tuple(pair) for pair in json.loads(plain.backend_tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def new_xclip(pictures: Path, tokenizer: CLIPTokenizer) -> XCLIPModel:
    """An X-CLIP for 9 frames of 64 x 64 that begins with what a CLIP knows of pictures, as arXiv 2208.02816 does.

    Clips change no text, so that a score is a plain cosine.

    Args:
        pictures: folder of the CLIP.
        tokenizer: of the captions of clips; words that the CLIP has not seen begin at random.
    """
    clip = load_whole(CLIPModel, str(pictures), dtype=torch.float32)
    vision = {
        **clip.config.vision_config.to_dict(),
        "num_frames": NUM_FRAMES,
        "mit_hidden_size": FEATURES,
        "mit_intermediate_size": 4 * FEATURES,
        "mit_num_hidden_layers": 2,
        "mit_num_attention_heads": 4,
    }
    text = {
        **clip.config.text_config.to_dict(),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = XCLIPModel(
        XCLIPConfig(text_config=text, vision_config=vision, projection_dim=FEATURES, prompt_layers=0, dtype="float32")
    )
    known = {name.replace("pre_layrnorm", "pre_layernorm"): value for name, value in clip.state_dict().items()}
    known_words = known.pop(WORDS)
    model.load_state_dict(known, strict=False)
    own, before = tokenizer.get_vocab(), CLIPTokenizer.from_pretrained(pictures).get_vocab()
    shared = sorted(own.keys() & before.keys())
    with torch.no_grad():
        words = model.get_parameter(WORDS)
        words[[own[word] for word in shared]] = known_words[[before[word] for word in shared]]
        torch.nn.init.normal_(model.mit.position_embedding, std=FRAME_SPREAD)
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
        batch: int = 20,
    ) -> None:
        super().__init__(model, steps, seed, muon_lr=1e-3, adam_lr=5e-4)
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
        for part, truth, weight in ((bare, concept, 1), (styles, style, 1), (motions, motion, MOTION_WEIGHT)):
            loss = loss + weight * F.cross_entropy(part, truth, label_smoothing=0.05)
        return {
            "loss": loss,
            "whole": (whole.argmax(1) == own).float().mean(),
            "concept": (bare.argmax(1) == concept).float().mean(),
            "style": (styles.argmax(1) == style).float().mean(),
            "motion": (motions.argmax(1) == motion).float().mean(),
        }
