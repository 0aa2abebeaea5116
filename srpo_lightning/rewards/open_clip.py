"""open_clip's CLIP weights as a transformers CLIPModel.

Source of the names: open_clip's `model.py` and `transformer.py`, transformers' `modeling_clip.py`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from srpo_lightning.files.pretrained import load_exactly

TOWERS = {"visual.": "vision_model.", "": "text_model."}
BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
RENAMED = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def clip_model(state: Mapping[str, Tensor], num_heads: int, source: str | Path) -> CLIPModel:
    """The model that an open_clip state dict is of.

    Args:
        state: Tensors by open_clip's names.
        num_heads: Number of heads in both towers' attention, 16 for ViT-H-14; the weights do not show it.
        source: Origin of the weights, named in errors.

    Raises:
        ValueError: listing the first differences, if these are not the weights of a CLIP vision transformer.
    """
    needed = ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight", "text_projection")
    absent = [name for name in needed if name not in state]
    if absent:
        raise ValueError(
            f"{source} holds no open_clip vision transformer: missing {', '.join(absent)}, "
            f"found {', '.join(sorted(state)[:3])}, ...: give the published file"
        )
    with init_empty_weights(include_buffers=False):
        model = CLIPModel(_config(state, num_heads))
    load_exactly(model, dict(_renamed(state)), source)
    return model


def _config(state: Mapping[str, Tensor], num_heads: int) -> CLIPConfig:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    num_patches = len(state["visual.positional_embedding"]) - 1
    vocabulary, text_width = state["token_embedding.weight"].shape
    return CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        vision_config={
            **_tower(state, "visual.", width, num_heads),
            "patch_size": patch,
            "image_size": round(num_patches**0.5) * patch,
        },
        text_config={
            **_tower(state, "", text_width, num_heads),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state["positional_embedding"]),
            # The tokenizer's first of the last two ids opens a text and the last one closes it.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )


def _tower(state: Mapping[str, Tensor], tower: str, width: int, num_heads: int) -> dict[str, int | str]:
    prefix = f"{tower}transformer.resblocks."
    return {
        "hidden_size": width,
        "intermediate_size": state[f"{prefix}0.mlp.c_fc.bias"].shape[0],
        "num_hidden_layers": len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)}),
        "num_attention_heads": num_heads,
        "hidden_act": "gelu",
        "projection_dim": state["text_projection"].shape[1],
    }


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if name in RENAMED:
            yield RENAMED[name], tensor
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], tensor.T.contiguous()
        elif "transformer.resblocks." in name:
            yield from _block(name, tensor)
        elif name != "attn_mask":  # a constant of older versions
            yield name, tensor


def _block(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    tower, _, rest = name.partition("transformer.resblocks.")
    number, _, own = rest.partition(".")
    layer = f"{TOWERS[tower]}encoder.layers.{number}."
    part, _, kind = own.rpartition(".")
    if own.startswith("attn.in_proj_"):
        for projection, third in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}self_attn.{projection}_proj.{own.removeprefix('attn.in_proj_')}", third.clone()
    elif part == "attn.out_proj":
        yield f"{layer}self_attn.out_proj.{kind}", tensor
    else:
        yield f"{layer}{BLOCK.get(part, part)}.{kind}", tensor
