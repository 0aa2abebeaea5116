"""Architectures of published models, so that their memory can be estimated where their files are not.

Source: the config.json files of the hub models that are named here.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from transformers import CLIPConfig

from srpo_lightning.jobs import letters
from srpo_lightning.policies.family import families


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

REWARDS: dict[str, dict[str, dict[str, Any]]] = {
    "xswu/HPSv2": VIT_H_14,
    "yuvalkirstain/PickScore_v1": VIT_H_14,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H_14,
    "openai/clip-vit-large-patch14": VIT_L_14,
}

COMMUNITY = "community licence, free below a yearly revenue of 1 million dollars"
LICENCES: dict[str, str] = {
    "black-forest-labs/FLUX.1-dev": "non-commercial, gated",
    "black-forest-labs/FLUX.1-Krea-dev": "non-commercial, gated",
    "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-9B": "non-commercial",
    "black-forest-labs/FLUX.2-dev": "non-commercial",
    "Tongyi-MAI/Z-Image": "Apache-2.0",
    "Qwen/Qwen-Image": "Apache-2.0",
    "Qwen/Qwen-Image-2512": "Apache-2.0",
    "krea/Krea-2-Raw": COMMUNITY,
    "stabilityai/stable-diffusion-3.5-medium": COMMUNITY,
    "stabilityai/stable-diffusion-3.5-large": COMMUNITY,
    "lodestones/Chroma1-HD": "Apache-2.0",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Apache-2.0",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "Apache-2.0",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "Apache-2.0",
    "KwaiVGI/VideoReward": "Apache-2.0",
    "Qwen/Qwen2-VL-2B-Instruct": "Apache-2.0",
    "Qwen/Qwen2-VL-7B-Instruct": "Apache-2.0",
}
"""In short: read the models' own pages before use."""


def small_files(name: str) -> Mapping[str, Mapping[str, Any]] | None:
    """The small files of a published model by path: of a reward, or of a policy as its family's file has them."""
    return REWARDS.get(name) or next((own.published[name] for own in families() if name in own.published), None)


def write_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Small files by path, as JSON."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_small_files(name: str, files: Mapping[str, Mapping[str, Any]], parent: Path) -> Path:
    """A folder in `parent` with the small files of a model of that name, and a tokenizer of single letters."""
    folder = parent / name.replace("/", "--")
    write_files(folder, files)
    letters.clip(77).save_pretrained(folder)
    return folder


@contextmanager
def local_files(config: Namespace) -> Iterator[list[str]]:
    """Put folders of small files in the place of published models; yields the names of those."""
    with tempfile.TemporaryDirectory() as folder:
        used: list[str] = []

        def visit(value: Any) -> Any:
            if isinstance(value, Namespace):
                value.pop("filename", None)  # of weights, which are not read
                for key, own in vars(value).items():
                    value[key] = visit(own)
            elif isinstance(value, list):
                return [visit(own) for own in value]
            elif isinstance(value, dict):
                return {key: visit(own) for key, own in value.items()}
            elif isinstance(value, str):
                name = "xswu/HPSv2" if Path(value).name.startswith("HPS_v2") and value.endswith(".pt") else value
                if files := small_files(name):
                    used.append(name)
                    return str(write_small_files(name, files, Path(folder)))
            return value

        visit(config.model)
        visit(config.trainer.callbacks)
        yield list(dict.fromkeys(used))
