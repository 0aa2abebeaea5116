"""The folder that VideoAlign's model is published in: its settings, and weights that peft wrote, with LoRA merged."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_lightning.files.pretrained import part, read_json, read_weights, safetensors_files

SETTINGS = "model_config.json"
PUBLISHED_CHECKPOINT = "checkpoint-11352"
WHOLE = "model.pth"
ADAPTER = "adapter_model.safetensors"
BESIDE_ADAPTER = "non_lora_state_dict.pth"

DIMENSIONS = ("VQ", "MQ", "TA")


def read_settings(weights: str) -> dict[str, Any]:
    """What the model was trained with, which its reading depends on; a local folder must have a checkpoint too.

    Args:
        weights: Folder or hub id.

    Raises:
        ValueError: naming what is missing, or which setting is not read here.
    """
    settings = read_json(weights, "", SETTINGS)
    _check(settings, f"{weights}/{SETTINGS}")
    if Path(weights).expanduser().is_dir() and not _is_adapter(weights):
        part(weights, _latest(weights), WHOLE)
    return settings


def read_checkpoint(
    weights: str, pretrained: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Path]:
    """The latest checkpoint's tensors without LoRA's, and the file that they are of.

    Args:
        weights: Folder or hub id; model.pth holds the whole model, an adapter only what differs from `pretrained`.
        pretrained: Folder or hub id of the Qwen2-VL that an adapter was made of.
        settings: Content of `model_config.json`.
        dtype: Numbers that merged weights are kept in.
    """
    folder, is_adapter = _latest(weights), _is_adapter(weights)
    path = Path(part(weights, folder, ADAPTER if is_adapter else WHOLE))
    state = plainly_named(read_weights(path))
    if is_adapter:
        files = set(safetensors_files(pretrained, "", "model").values())
        base = {name: tensor for file in files for name, tensor in read_weights(file).items()}
        state = base | plainly_named(read_weights(Path(part(weights, folder, BESIDE_ADAPTER)))) | state
    merge_lora(state, lora_scale(settings["peft_lora_config"]), dtype)
    return state, path


def _check(settings: Mapping[str, Any], source: str) -> None:
    """Refuse a reward model of the same code that is asked or read in another way.

    Args:
        settings: Content of `model_config.json`.
        source: Name of that file, for the message.

    Raises:
        ValueError: naming the setting, what is there and what is read here.
    """
    known: dict[tuple[str, str], tuple[Any, ...]] = {
        ("data_config", "prompt_template_type"): ("detailed_special",),
        ("data_config", "sample_type"): ("uniform",),
        ("model_config", "use_special_tokens"): (True,),
        ("model_config", "output_dim"): (1, len(DIMENSIONS)),
    }
    for (group, name), values in known.items():
        found = (settings.get(group) or {}).get(name)
        if found not in values:
            raise ValueError(
                f"{source} has {group}.{name} {found!r}, VideoAlignReward reads {' or '.join(map(repr, values))}: give "
                "KwaiVGI/VideoReward, or a model that was trained by the same settings"
            )
    for group, names in {"data_config": ("fps", "max_frame_pixels"), "peft_lora_config": ("lora_enable",)}.items():
        lacking = [name for name in names if name not in (settings.get(group) or {})]
        if lacking:
            raise ValueError(f"{source} lacks {group}.{lacking[0]}: download KwaiVGI/VideoReward again")


def plainly_named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they would have without peft; LoRA's own end in `lora_A.weight` and `lora_B.weight`."""
    plain = {}
    for name, tensor in state.items():
        bare = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        plain[re.sub(r"\.(lora_[AB])\.default\.", r".\1.", bare)] = tensor
    return plain


def lora_scale(config: dict[str, Any]) -> float:
    """What the product of LoRA's two matrices is multiplied by."""
    if not config["lora_enable"]:
        return 0.0
    rank, alpha = config["lora_r"], config["lora_alpha"]
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def merge_lora(state: dict[str, Tensor], scale: float, dtype: torch.dtype) -> None:
    """Add LoRA to the weights that it belongs to, in float32, and take it out of the state.

    Args:
        state: Tensors by plain names.
        scale: Factor of the product.
        dtype: Numbers that a sum is kept in.
    """
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        of_inputs, of_outputs, own = name, f"{stem}.lora_B.weight", f"{stem}.weight"
        if of_outputs in state and own in state:  # else it is refused with the rest that fits nowhere
            product = state.pop(of_outputs).float() @ state.pop(of_inputs).float()
            state[own] = product.mul_(scale).add_(state[own]).to(dtype)


def _latest(weights: str) -> str:
    """The folder of the latest checkpoint, which the original takes; on the hub there is one."""
    numbers = [
        int(found[1])
        for path in Path(weights).expanduser().glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return f"checkpoint-{max(numbers)}" if numbers else PUBLISHED_CHECKPOINT


def _is_adapter(weights: str) -> bool:
    """Whether a folder's checkpoint is LoRA and what was trained beside it, instead of the whole model."""
    folder = Path(weights).expanduser() / _latest(weights)
    return (folder / ADAPTER).is_file() and not (folder / WHOLE).is_file()
