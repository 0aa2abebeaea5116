"""Models with random weights in the layouts of real ones, small enough that a training step takes milliseconds."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
MAX_TOKENS = 12
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "vocab_size": 3 + 2 * len(CHARACTERS),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *CHARACTERS]
    return T5TokenizerFast(vocab=[(p, -1.0) for p in pieces], extra_ids=0, model_max_length=MAX_TOKENS)


def write_pipeline(folder: Path, seed: int = 0, guidance_embeds: bool = True, width: int = 16) -> Path:
    """A FluxPipeline for 16 x 16 pictures and up, factor 8 as FLUX's VAE."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=width // 8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
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
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config=CLIPTextConfig(**TEXT).to_dict(), vision_config=CLIPVisionConfig(**vision).to_dict())
    config.projection_dim = 16
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def write_prompts(folder: Path) -> tuple[Path, Path]:
    train, evaluation = folder / "train.txt", folder / "eval.txt"
    train.write_text("\n".join(f"a{i} b" for i in range(7)))
    evaluation.write_text("\n".join(f"c{i}" for i in range(3)))
    return train, evaluation
