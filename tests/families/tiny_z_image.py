"""Z-Image in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from srpo_lightning.policies import ZImagePolicy
from tests.families import qwen
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
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=qwen.qwen3(len(tokenizer), 3),
        tokenizer=tokenizer,
        transformer=qwen.noisy(ZImageTransformer2DModel(**size | changes)),
    ).save_pretrained(folder)
    return folder


class WrongSign(ZImagePolicy):
    def network(self, *arguments):
        return -super().network(*arguments)


class ToldTheNoise(ZImagePolicy):
    def network(self, x, sigma, *arguments):
        return super().network(x, 1 - sigma, *arguments)


class PaddedText(ZImagePolicy):
    def network(self, x, sigma, text, *arguments):
        return super().network(x, sigma, text._replace(lengths=None), *arguments)


class Unshifted(ZImagePolicy):
    def shift_for(self, num_steps, size):
        return 1.0


class PipelinesScale(ZImagePolicy):
    def guide(self, conditional, unconditional, guidance):
        return super().guide(conditional, unconditional, guidance - 1)


CASE = Case(
    ZImagePolicy,
    write,
    {
        "sign": WrongSign,
        "level": ToldTheNoise,
        "padding": PaddedText,
        "shift": Unshifted,
        "guidance": PipelinesScale,
    },
    refused={"rollout_cache": (0.1, "null"), "exact_conditioning": (True, "false")},
)
