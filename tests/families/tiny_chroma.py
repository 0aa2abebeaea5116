"""Chroma in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from srpo_lightning.policies import ChromaPolicy
from tests import tiny
from tests.families import mistakes, qwen
from tests.families.case import Case


def write(folder: Path, **changes: Any) -> Path:
    """A pipeline for 16 x 16 pictures and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    size = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 2,
    }
    vae, t5 = tiny.kl_vae(), tiny.t5_encoder()
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen.noisy(t5),
        tokenizer=tiny.t5_tokenizer(),
        transformer=qwen.noisy(ChromaTransformer2DModel(**size | changes)),
    ).save_pretrained(folder)
    return folder


def features(pipe, prompts, length):
    rows, _, masks, *_ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
    return [{"prompt_embeds": r, "prompt_attention_mask": m} for r, m in zip(rows, masks, strict=True)]


CASE = Case(
    ChromaPolicy,
    write,
    {
        "sign": mistakes.wrong_sign(ChromaPolicy),
        "level": mistakes.told(ChromaPolicy, lambda sigma: 1000 * sigma),
        "mask": mistakes.reading(ChromaPolicy, lambda text: text.each(torch.ones_like)),
        "shift": mistakes.unshifted(ChromaPolicy),
        "guidance": mistakes.pipelines_scale(ChromaPolicy),
    },
    refused={"rollout_cache": (0.1, "null")},
    features=features,
)
