"""Wan in small: 2.1 by UniPC's steps and by Euler's, and 2.2's model with finer cells."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from srpo_lightning.policies import WanPolicy
from srpo_lightning.policies.family import Family
from tests import tiny
from tests.families import mistakes, qwen
from tests.families.case import Case

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.3, -0.5, 0.1, 1.2],
    "latents_std": [0.7, 2.5, 1.3, 0.4],
}
FINE: dict[str, Any] = VAE | {
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def write(folder: Path, vae: dict[str, Any] = VAE, multistep: bool = True, **changes: Any) -> Path:
    """A pipeline for pictures of 16 x 16, or 32 x 32, and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    text = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    scheduler = UniPCMultistepScheduler(**UNIPC) if multistep else FlowMatchEulerDiscreteScheduler(shift=3.0)
    WanPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=qwen.noisy(UMT5EncoderModel(UMT5Config(**text))),
        vae=qwen.noisy(AutoencoderKLWan(**vae)),
        transformer=qwen.noisy(WanTransformer3DModel(**TRANSFORMER | changes)),
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


class ByEulersSteps(WanPolicy):
    integrate = Family.integrate


class WithoutPadding(WanPolicy):
    """Attention without the zeros behind a text."""

    def network(self, x, sigma, text, *arguments):
        self.text_rows = text.tensors["prompt_embeds"].shape[1]
        return super().network(x, sigma, text, *arguments)


class WithoutStatistics(WanPolicy):
    def to_vae(self, vae, latents, size):
        return latents


class ShiftedOnce(WanPolicy):
    shifts_twice = False


def features(pipe, prompts, length):
    padded, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    return [{"prompt_embeds": rows[rows.abs().sum(1) > 0]} for rows in padded]


MISTAKES = {
    "sign": mistakes.wrong_sign(WanPolicy),
    "level": mistakes.told(WanPolicy, lambda sigma: sigma / 1000),
    "padding": WithoutPadding,
    "vae": WithoutStatistics,
}

CASE = Case(
    WanPolicy,
    write,
    MISTAKES | {"steps": ByEulersSteps},
    refused={"exact_conditioning": (True, "false")},
    features=features,
)
