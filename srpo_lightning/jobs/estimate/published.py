"""Architectures of published models, so that their memory can be estimated where their files are not.

Source: the config.json files of the hub models that are named here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPTokenizer

FLUX: dict[str, dict[str, Any]] = {
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "scheduler/scheduler_config.json": {"shift": 3.0, "use_dynamic_shifting": True},
    "text_encoder/config.json": {"hidden_size": 768},
    "text_encoder_2/config.json": {"d_model": 4096},
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
}


def _clip(text: Mapping[str, Any], vision: Mapping[str, Any], activation: str, projection_dim: int) -> dict[str, Any]:
    shared = {"hidden_act": activation, "projection_dim": projection_dim}
    config = CLIPConfig(
        text_config={**text, **shared, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**vision, **shared, "patch_size": 14, "image_size": 224},
        projection_dim=projection_dim,
    )
    return {"config.json": config.to_dict(), "preprocessor_config.json": {"crop_size": 224, "size": 224}}


def _tower(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


VIT_H_14 = _clip(_tower(1024, 24, 16), _tower(1280, 32, 16), "gelu", 1024)
VIT_L_14 = _clip(_tower(768, 12, 12), _tower(1024, 24, 16), "quick_gelu", 768)

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "black-forest-labs/FLUX.1-dev": FLUX,
    "xswu/HPSv2": VIT_H_14,
    "yuvalkirstain/PickScore_v1": VIT_H_14,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H_14,
    "openai/clip-vit-large-patch14": VIT_L_14,
}


def write_small_files(name: str, parent: Path) -> Path:
    """A folder in `parent` with the small files of a model in `PUBLISHED`, and a tokenizer of single letters."""
    folder = parent / name.replace("/", "--")
    for path, content in PUBLISHED[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    letters = [chr(number) for number in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return folder
