"""Krea 2 in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

from srpo_lightning.policies import Krea2Policy
from srpo_lightning.policies.krea2 import BEFORE
from tests.families import mistakes, qwen
from tests.families.case import Case


def write(folder: Path, is_distilled: bool = False, **changes: Any) -> Path:
    """A pipeline for 16 x 16 pictures and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    tokenizer = qwen.tokenizer(24, BEFORE)
    size = {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (2, 2, 4),
    }
    vae = qwen.video_vae()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=100
    )
    Krea2Pipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=qwen.qwen3_vl(len(tokenizer), 4),
        tokenizer=tokenizer,
        transformer=qwen.noisy(Krea2Transformer2DModel(**size | changes)),
        text_encoder_select_layers=(1, 2, 4),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


class Turbo(Krea2Policy):
    is_distilled = True


CASE = Case(
    Krea2Policy,
    write,
    {
        "sign": mistakes.wrong_sign(Krea2Policy),
        "level": mistakes.told(Krea2Policy, lambda sigma: 1000 * sigma),
        "mask": mistakes.without_mask(Krea2Policy),
        "schedule": Turbo,
        "statistics": mistakes.without_statistics(Krea2Policy),
        "guidance": mistakes.pipelines_scale(Krea2Policy),
    },
    refused={"rollout_cache": (0.1, "null"), "exact_conditioning": (True, "false")},
)
