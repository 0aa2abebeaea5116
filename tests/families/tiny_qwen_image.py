"""Qwen-Image in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

from srpo_lightning import flow
from srpo_lightning.policies import QwenImagePolicy
from srpo_lightning.policies.family import Family
from srpo_lightning.policies.qwen_image import BEFORE
from tests.families import mistakes, qwen
from tests.families.case import Case


def write(folder: Path, **changes: Any) -> Path:
    """A pipeline for 16 x 16 pictures and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    tokenizer = qwen.tokenizer(64, BEFORE)
    size = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    }
    vae = qwen.video_vae()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=4,
        max_image_seq_len=100,
        shift_terminal=0.02,
    )
    QwenImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=qwen.qwen2_5_vl(len(tokenizer), 2),
        tokenizer=tokenizer,
        transformer=qwen.noisy(QwenImageTransformer2DModel(**size | changes)),
    ).save_pretrained(folder)
    return folder


class WithoutStretch(QwenImagePolicy):
    def schedule(self, num_steps, size):
        return flow.schedule(num_steps, self.shift_for(num_steps, size))


class WithoutRescaling(QwenImagePolicy):
    guide = Family.guide


class RescaledAsAWhole(QwenImagePolicy):
    """With the picture as long as without guidance, not each of its tokens."""

    def guide(self, conditional, unconditional, guidance):
        guided = Family.guide(self, conditional, unconditional, guidance)
        lengths = (v.norm(dim=(1, 2), keepdim=True) for v in (conditional, guided))
        return guided * torch.div(*lengths)


CASE = Case(
    QwenImagePolicy,
    write,
    {
        "sign": mistakes.wrong_sign(QwenImagePolicy),
        "level": mistakes.told(QwenImagePolicy, lambda sigma: 1000 * sigma),
        "mask": mistakes.without_mask(QwenImagePolicy),
        "schedule": WithoutStretch,
        "rescaling": WithoutRescaling,
        "whole": RescaledAsAWhole,
        "guidance": mistakes.pipelines_scale(QwenImagePolicy),
        "packing": mistakes.another_packing(QwenImagePolicy),
        "statistics": mistakes.without_statistics(QwenImagePolicy),
    },
)
