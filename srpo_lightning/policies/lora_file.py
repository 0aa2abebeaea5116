"""A LoRA in diffusers' format, read for its names, shapes and scales."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from srpo_lightning.files.pretrained import unreadable_is_refused, weights_file

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."  # of the names in it
METADATA = "lora_adapter_metadata"  # of it: the adapter's settings in JSON


class LoraFile(NamedTuple):
    """A LoRA in diffusers' format.

    Args:
        path: of the file.
        shapes: by the tensors' names in the transformer.
        scales: of B A, by the name of B.
    """

    path: Path
    shapes: dict[str, list[int]]
    scales: dict[str, float]

    @classmethod
    def read(cls, pretrained: str) -> "LoraFile":
        """Names and settings, no weights.

        Raises:
            ValueError: naming the cure, if it is no such file.
        """
        folder = Path(pretrained).expanduser()
        if folder.is_dir() and not (folder / FILE).is_file():
            raise ValueError(f"{folder} holds no {FILE}: give a folder that `export --format lora` or LoraExport wrote")
        path = weights_file(pretrained, FILE)
        with unreadable_is_refused(pretrained), safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            alphas = {key: float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if key not in alphas}  # noqa: SIM118
        foreign = next((key for key in shapes if not key.startswith(PREFIX) or ".lora_" not in key), None)
        patterns = [key for key in ("rank_pattern", "alpha_pattern") if metadata.get(f"{PREFIX}{key}")]
        if foreign or patterns or not shapes:
            raise ValueError(
                f"{path} is no LoRA of one rank and scale by diffusers' names "
                f"({foreign or ', '.join(patterns) or 'it is empty'}): give a {FILE} that `export --format lora` wrote"
            )
        scales = {}
        for key, shape in shapes.items():
            if key.endswith(".lora_B.weight"):
                alpha = metadata.get(f"{PREFIX}lora_alpha", alphas.get(f"{key[:-14]}.alpha", shape[1]))
                is_rslora = metadata.get(f"{PREFIX}use_rslora", False)
                scales[key.removeprefix(PREFIX)] = float(alpha) / (math.sqrt(shape[1]) if is_rslora else shape[1])
        return cls(path, {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}, scales)
