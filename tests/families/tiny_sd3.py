"""Stable Diffusion 3.5 in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from srpo_lightning.batch import Text
from srpo_lightning.policies import SD3Policy
from tests import tiny
from tests.families import mistakes, qwen
from tests.families.case import Case


def write(folder: Path, **changes: Any) -> Path:
    """A pipeline for 16 x 16 pictures and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    size = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    vae = tiny.kl_vae()
    clips = [
        CLIPTextModelWithProjection(CLIPTextConfig(**tiny.TEXT | {"projection_dim": width, "num_hidden_layers": 2}))
        for width in (8, 16)
    ]
    t5 = tiny.t5_encoder(40)
    transformer = qwen.noisy(SD3Transformer2DModel(**size | changes))
    transformer.pos_embed.pos_embed.add_(torch.randn_like(transformer.pos_embed.pos_embed), alpha=0.1)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=qwen.noisy(clips[0]),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=qwen.noisy(clips[1]),
        tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=qwen.noisy(t5),
        tokenizer_3=tiny.t5_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


class ShiftedOnce(SD3Policy):
    shifts_twice = False


def second_pooled_alone(text: Text) -> Text:
    pooled = text.tensors["pooled_prompt_embeds"].clone()
    pooled[:, :8] = 0
    return text._replace(tensors={**text.tensors, "pooled_prompt_embeds": pooled})


class WithoutShift(SD3Policy):
    def to_vae(self, vae, latents, size):
        return latents / vae.config.scaling_factor


def features(pipe, prompts, length):
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return [{"prompt_embeds": e, "pooled_prompt_embeds": p} for e, p in zip(embeds, pooled, strict=True)]


CASE = Case(
    SD3Policy,
    write,
    {
        "sign": mistakes.wrong_sign(SD3Policy),
        "level": mistakes.told(SD3Policy, lambda sigma: sigma / 1000),
        "schedule": ShiftedOnce,
        "pooled": mistakes.reading(SD3Policy, second_pooled_alone),
        "vae": WithoutShift,
    },
    refused={"rollout_cache": (0.1, "null"), "exact_conditioning": (True, "false")},
    features=features,
)
