"""Configurations that several published models share, without what is a default of diffusers' classes."""

from typing import Any


def kl_vae(scaling_factor: float, shift_factor: float) -> dict[str, Any]:
    """Of the AutoencoderKL with 16 channels that FLUX.1 came with; others differ in its scale."""
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
