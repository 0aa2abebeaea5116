"""Chroma in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from srpo_lightning.policies import ChromaPolicy
from tests import tiny
from tests.families import qwen
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
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
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


class WrongSign(ChromaPolicy):
    def network(self, *arguments):
        return -super().network(*arguments)


class ToldThousands(ChromaPolicy):
    def network(self, x, sigma, *arguments):
        return super().network(x, 1000 * sigma, *arguments)


class WithoutMask(ChromaPolicy):
    def network(self, x, sigma, text, *arguments):
        return super().network(x, sigma, text.each(torch.ones_like), *arguments)


class Unshifted(ChromaPolicy):
    def shift_for(self, num_steps, size):
        return 1.0


class PipelinesScale(ChromaPolicy):
    def guide(self, conditional, unconditional, guidance):
        return super().guide(conditional, unconditional, guidance - 1)


CASE = Case(
    ChromaPolicy,
    write,
    {
        "sign": WrongSign,
        "level": ToldThousands,
        "mask": WithoutMask,
        "shift": Unshifted,
        "guidance": PipelinesScale,
    },
    refused={"rollout_cache": (0.1, "null")},
    features=features,
)
