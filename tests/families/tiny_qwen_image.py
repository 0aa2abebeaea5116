"""Qwen-Image in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from srpo_lightning import flow
from srpo_lightning.policies import QwenImagePolicy
from srpo_lightning.policies.family import Family
from srpo_lightning.policies.packing import unpack
from srpo_lightning.policies.qwen_image import BEFORE
from tests.families import qwen
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
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.3, -0.5, 0.1, 1.2], latents_std=[0.7, 2.5, 1.3, 0.4]
    )
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
        vae=qwen.noisy(vae),
        text_encoder=qwen.qwen2_5_vl(len(tokenizer), 2),
        tokenizer=tokenizer,
        transformer=qwen.noisy(QwenImageTransformer2DModel(**size | changes)),
    ).save_pretrained(folder)
    return folder


class WrongSign(QwenImagePolicy):
    def network(self, *arguments):
        return -super().network(*arguments)


class ToldThousands(QwenImagePolicy):
    def network(self, x, sigma, *arguments):
        return super().network(x, 1000 * sigma, *arguments)


class WithoutMask(QwenImagePolicy):
    def network(self, x, sigma, text, *arguments):
        return super().network(x, sigma, text._replace(lengths=None), *arguments)


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


class PipelinesScale(QwenImagePolicy):
    def guide(self, conditional, unconditional, guidance):
        return super().guide(conditional, unconditional, guidance - 1)


class AnotherPacking(QwenImagePolicy):
    """With the channels of a cell's place together."""

    def to_vae(self, vae, latents, size):
        batch_size, num_tokens, channels = latents.shape
        turned = latents.view(batch_size, num_tokens, 4, channels // 4).mT.flatten(2)
        return super().to_vae(vae, turned, size)


class WithoutStatistics(QwenImagePolicy):
    def to_vae(self, vae, latents, size):
        return unpack(latents, size)


CASE = Case(
    QwenImagePolicy,
    write,
    {
        "sign": WrongSign,
        "level": ToldThousands,
        "mask": WithoutMask,
        "schedule": WithoutStretch,
        "rescaling": WithoutRescaling,
        "whole": RescaledAsAWhole,
        "guidance": PipelinesScale,
        "packing": AnotherPacking,
        "statistics": WithoutStatistics,
    },
)
