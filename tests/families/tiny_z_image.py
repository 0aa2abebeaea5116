"""Z-Image in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from srpo_lightning.policies import ZImagePolicy
from tests import tiny
from tests.families import mistakes, qwen
from tests.families.case import Case


def write(folder: Path, **changes: Any) -> Path:
    """A pipeline for 16 x 16 pictures and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    tokenizer = qwen.tokenizer(48)
    size = {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [2, 2, 4],
        "axes_lens": [128, 32, 32],
    }
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.kl_vae(),
        text_encoder=qwen.qwen3(len(tokenizer), 3),
        tokenizer=tokenizer,
        transformer=qwen.noisy(ZImageTransformer2DModel(**size | changes)),
    ).save_pretrained(folder)
    return folder


CASE = Case(
    ZImagePolicy,
    write,
    {
        "sign": mistakes.wrong_sign(ZImagePolicy),
        "level": mistakes.told(ZImagePolicy, lambda sigma: 1 - sigma),
        "padding": mistakes.without_mask(ZImagePolicy),
        "shift": mistakes.unshifted(ZImagePolicy),
        "guidance": mistakes.pipelines_scale(ZImagePolicy),
    },
    refused={"rollout_cache": (0.1, "null"), "exact_conditioning": (True, "false")},
)
