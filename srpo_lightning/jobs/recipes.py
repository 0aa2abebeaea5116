"""`recipes`: the configurations that come with the package, by the name that `--config recipe:NAME` takes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from srpo_lightning.config import shipped
from srpo_lightning.config.shipped import RECIPES

HARDWARE = re.compile(r"Hardware: [^\n]*?(\w+ GPUs? with \d+ GB)")
PEAK = re.compile(r"Predicted peak \(`estimate`[^)]*\): ([0-9.]+ GiB(?: per GPU)?)")


class Recipe(NamedTuple):
    """What the list says of a configuration.

    Args:
        name: Name of the recipe, those in folders with the folder's.
        summary: First sentence of its head, for one that stands beside another; otherwise what it trains and how.
        memory: Predicted memory and hardware, as its head states them; empty where it does not.
    """

    name: str
    summary: str
    memory: str


def recipes(recipe: str | None = None) -> None:
    """List the recipes that come with the package, or print one.

    Args:
        recipe: Name of a recipe whose file is printed, with or without `recipe:` before it; null lists all.

    Raises:
        ValueError: if there is none of this name, with the nearest.
    """
    if recipe is not None:
        print(shipped.recipe_file(recipe).read_text(encoding="utf-8"), end="")
        return
    found = [described(name) for name in shipped.recipes()]
    alone = [own for own in found if "/" not in own.name]
    beside = [own for own in found if "/" in own.name]
    print("Recipes, each for `fit --config recipe:NAME`; `recipes NAME` prints one:\n")
    print("\n".join(lines(alone)))
    print("\nBeside one of these, as a second --config, another model or another form:\n")
    print("\n".join(lines(beside)))


def lines(found: list[Recipe]) -> list[str]:
    """A line for each recipe, in columns."""
    name, summary = (max(len(column) for column in columns) for columns in list(zip(*found, strict=True))[:2])
    return [f"  {own.name:<{name}}  {own.summary:<{summary}}  {own.memory}".rstrip() for own in found]


def described(name: str) -> Recipe:
    """What a recipe's file says of itself.

    Args:
        name: Name of a recipe that is there.
    """
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    head = head_of(text)
    if "/" in name:
        return Recipe(name, first_sentence(head), "")
    hardware, peak = HARDWARE.search(head), PEAK.search(head)
    memory = [found[1] for found in (peak, hardware) if found]
    return Recipe(name, method_of(yaml.safe_load(text)), " of ".join(memory))


def head_of(text: str) -> str:
    """The comment that a file begins with, on one line, without the commands in it."""
    own = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#  "):
            own.append(line.removeprefix("#").strip())
    return " ".join(own)


def first_sentence(head: str) -> str:
    """The first sentence of a comment, without what every such comment says."""
    sentence = re.split(r"\.(?= [A-Z]|$)", head, maxsplit=1)[0]
    sentence = re.sub(r": beside a recipe of FLUX\.1, which says what is trained and on what", "", sentence)
    return re.sub(r"^Beside ([^:,]+): ", r"beside \1: ", sentence)


def method_of(settings: Mapping[str, Any]) -> str:
    """What a configuration trains, and by which objective."""
    model = settings["model"]
    policy = model["policy"]["init_args"]
    trained = "all weights"
    if policy.get("adapter"):
        trained = "QLoRA" if policy.get("quantize", "none") != "none" else "LoRA"
    objective = model["objective"]["class_path"].rpartition(".")[2]
    name = Path(policy["pretrained"].partition(":")[2] or policy["pretrained"]).name
    pictures = ", on real pictures" if settings["data"].get("offline_ratio") else ""
    return f"{name}: {objective}, {trained}, {policy['width']} px{pictures}"
