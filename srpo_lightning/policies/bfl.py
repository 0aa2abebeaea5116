"""FLUX.1's weights by the names of Black Forest Labs' repository, which ComfyUI reads, from diffusers' and back.

Source: github.com/black-forest-labs/flux, src/flux/model.py and modules/layers.py; the inverse of diffusers'
`convert_flux_transformer_checkpoint_to_diffusers`.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# A layer of theirs, and those of diffusers that it consists of, one below the other.
OUTER = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}
SHIFT_FIRST = "final_layer.adaLN_modulation.1."  # shift, then scale; in diffusers scale, then shift


def sources(names: Iterable[str]) -> dict[str, list[str]]:
    """Their name of each tensor, and diffusers' names of those that it consists of, in order.

    Args:
        names: of all parameters of diffusers' FluxTransformer2DModel.

    Raises:
        ValueError: if one of them has no place there.
    """
    known = set(names)
    found: dict[str, list[str]] = {}
    for ours, theirs, layers in _tables(known):
        for layer, parts in layers.items():
            for kind in ("weight", "bias"):
                own = [f"{ours}{part}.{kind}" for part in parts]
                if known.issuperset(own):
                    found[f"{theirs}{layer}.{'scale' if layer.endswith('_norm') else kind}"] = own
    left = sorted(known.difference(*found.values()))
    if left:
        raise ValueError(
            f"Black Forest Labs' FLUX.1 has no place for {len(left)} of the transformer's parameters, first {left[0]}: "
            "export it with --format diffusers"
        )
    return found


def joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Their tensor of that name, from those of diffusers."""
    return _turned(name, torch.cat(list(parts)))


def divided(name: str, tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Undo `joined`, for parts with so many rows."""
    return list(_turned(name, tensor).split(list(rows)))


def _turned(name: str, tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if name.startswith(SHIFT_FIRST) else tensor


def _tables(names: set[str]) -> list[tuple[str, str, dict[str, list[str]]]]:
    """Prefixes of diffusers' names and of theirs, and the layers that follow these."""
    blocks = {
        found[0]: found for name in sorted(names) if (found := re.match(r"(single_)?transformer_blocks\.(\d+)\.", name))
    }
    inner = [
        (prefix, f"{'single' if found[1] else 'double'}_blocks.{found[2]}.", SINGLE if found[1] else DOUBLE)
        for prefix, found in blocks.items()
    ]
    return [("", "", OUTER), *inner]
