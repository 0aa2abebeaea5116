"""LoRA files for ComfyUI: its names, and the weight that its loader makes of them.

Source: github.com/comfyanonymous/ComfyUI at 9c0cf36, `load_lora`, `model_lora_keys_unet` and `flux_to_diffusers` for
the names: diffusers' with a prefix, which it maps to rows of its fused layers, but of Wan those of the model's first
publication alone. `LoRAAdapter` and `weight_decompose` for the arithmetic: W + alpha / rank B A, of which `dora_scale`
over the length of a row of W, not of the sum, scales each row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ORIGINAL = "diffusion_model."
"""What stands before the names of a model's first publication."""


@torch.no_grad()
def layer_file(name: str, weight: Tensor, own: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors by ComfyUI's names, for an adapter whose scale is in B.

    Args:
        name: the layer's name in the file.
        weight: [rows, columns] of the base.
        own: `A`, `B` and of DoRA `magnitude_vector`.
        dtype: of A and B; the few other numbers are float32, as ComfyUI computes.
    """
    a, b = own["A"].to(dtype), own["B"].to(dtype)
    found = {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(float(len(a)))}
    if "magnitude_vector" in own:
        total = torch.linalg.vector_norm(weight.float() + b.float() @ a.float(), dim=1)
        lengths = torch.linalg.vector_norm(weight.float(), dim=1) / total
        found["dora_scale"] = (own["magnitude_vector"].float() * lengths)[:, None]
    return {f"{name}.{kind}": tensor.contiguous() for kind, tensor in found.items()}


@torch.no_grad()
def patched(name: str, weight: Tensor, file: Mapping[str, Tensor]) -> Tensor:
    """What ComfyUI makes of a layer's weight with such a file at strength 1, in float32."""
    a, b, alpha = (file[f"{name}.{kind}"].float() for kind in ("lora_A.weight", "lora_B.weight", "alpha"))
    total = weight.float() + alpha / len(a) * b @ a
    scale = file.get(f"{name}.dora_scale")
    return total if scale is None else total * scale / torch.linalg.vector_norm(weight.float(), dim=1, keepdim=True)
