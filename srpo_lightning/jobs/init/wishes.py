"""What a configuration is wished for, each wish checked as soon as it is said: by an option, or by an answer."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from srpo_lightning.config.shipped import RECIPES, recipes, with_builtin
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.jobs.estimate.units import parse_bytes
from srpo_lightning.suggestions import nearest

BUILTIN, FLUX = "builtin", "flux_dev"
FAMILIES = "families/"
METHODS = ("auto", "full", "lora", "qlora")

REWARDS: Mapping[str, Mapping[str, Any]] = {
    "HPSv2": {"pretrained": "xswu/HPSv2"},
    "PickScore": {"pretrained": "yuvalkirstain/PickScore_v1"},
    "ClipReward": {"pretrained": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
}
"""Rewards by their class, with the published model that each is made of; the recipes' is the first."""


class Wishes(NamedTuple):
    """What is wished for.

    Args:
        model: Name of the model, as `models` has them.
        pretrained: Folder or hub id in the place of the published model; None is the published one.
        gpu_memory: Bytes of one GPU; None without a GPU.
        gpus: Number of GPUs of the machine.
        method: Member of METHODS.
        train: Path of training prompts; None are those that come with the package.
        evaluation: Path of held-out prompts; None are those that come with the package, or a part of own ones.
        reward: Class of the reward, a name in REWARDS or a class_path; None is the recipe's.
        output: File that is written.
    """

    model: str
    pretrained: str | None
    gpu_memory: int | None
    gpus: int
    method: str
    train: str | None
    evaluation: str | None
    reward: str | None
    output: Path


@cache
def models() -> Mapping[str, str]:
    """The published models by the name of their recipe, and the built-in one."""
    found = {BUILTIN: "builtin:emoji-flux", FLUX: "black-forest-labs/FLUX.1-dev"}
    for name in (name for name in recipes() if name.startswith(FAMILIES)):
        settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        found[name.removeprefix(FAMILIES)] = settings["model"]["policy"]["init_args"]["pretrained"]
    return found


def model(text: str) -> str:
    """The name of a model, which may be given by its hub id.

    Raises:
        ValueError: listing all, with the nearest.
    """
    known = models()
    if text in known:
        return text
    if text in known.values():
        return next(name for name, published in known.items() if published == text)
    if Path(text).expanduser().is_dir():
        raise ValueError(f"model is {text}, a folder: name its model ({', '.join(known)}), and give it as --pretrained")
    raise ValueError(f"model is {text}: choose among {', '.join(known)}{nearest(text, known)}")


def gpu_memory(text: str) -> int:
    """Bytes of one GPU; a bare number counts GiB.

    Raises:
        ValueError: if it is no size.
    """
    return parse_bytes(f"{text}GiB" if text.replace(".", "", 1).isdigit() else text)


def gpus(text: str) -> int:
    """A number of GPUs.

    Raises:
        ValueError: if it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"gpus is {text}: expected a whole number above 0")
    return int(text)


def method(text: str) -> str:
    """What is trained: all weights, an adapter, or one beside 4 bits.

    Raises:
        ValueError: if it is none of these.
    """
    if text.lower() not in METHODS:
        raise ValueError(f"method is {text}: choose among {', '.join(METHODS)}{nearest(text, METHODS)}")
    return text.lower()


def prompts(text: str) -> str:
    """A file or folder of prompts that can be read.

    Raises:
        ValueError: with the cure, if it cannot.
    """
    read_prompts(str(with_builtin(text)))
    return text


def reward(text: str) -> str:
    """The name of a reward, or a class_path.

    Raises:
        ValueError: if it is neither.
    """
    if text not in REWARDS and "." not in text:
        known = f"{', '.join(REWARDS)}, or give a class_path, module.Class"
        raise ValueError(f"reward is {text}: choose among {known}{nearest(text, REWARDS)}")
    return text


def output(text: str, *, overwrite: bool) -> Path:
    """A file to write.

    Raises:
        ValueError: if it is there already, and is not to be written over.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        raise ValueError(f"output is {text}, a folder: give the name of a file, for instance {text}/my.yaml")
    if path.exists() and not overwrite:
        raise ValueError(f"{text} is there already: give another --output, or --overwrite true")
    return path
