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


def clip_text(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
    """Of a CLIP's text tower that reads 77 tokens: OpenAI's ViT-L/14, OpenCLIP's ViT-bigG/14."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
        "hidden_act": activation,
        "vocab_size": 49408,
    }


CLIP_L, CLIP_G = clip_text(768, 12, 12, "quick_gelu"), clip_text(1280, 32, 20, "gelu")

T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""The encoder of google/t5-v1_1-xxl."""


def qwen3(width: int, intermediate: int) -> dict[str, Any]:
    """Of Qwen3 with 36 layers."""
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }


QWEN3_4B, QWEN3_8B = qwen3(2560, 9728), qwen3(4096, 12288)

QWEN3_VL_4B: dict[str, Any] = {
    "text_config": QWEN3_4B
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}},
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}

QWEN2_5_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}

MISTRAL_SMALL: dict[str, Any] = {
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    },
    "tie_word_embeddings": False,
}
"""Mistral-Small-3.1-24B."""
