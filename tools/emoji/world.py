"""The pictures in memory: what every training step and every evaluation draws from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .captions import STYLES, concept_of, split
from .icons import Pictures, candidate_names, choose, fetch, on_white, render_all


class World(NamedTuple):
    """All concepts in all styles.

    Attributes:
        concepts: names as prompts write them, sorted.
        pictures: uint8 [concept, style, H, W, RGBA], straight alpha.
    """

    concepts: list[str]
    pictures: Pictures

    def images(self) -> Tensor:
        """On white, [concept * style, 3, H, W] in [0, 1]; row = concept * num_styles + style."""
        return torch.from_numpy(on_white(self.pictures)).flatten(0, 1).permute(0, 3, 1, 2).contiguous()

    def layers(self) -> Tensor:
        """Colour times alpha, and alpha: [concept * style, 4, H, W] in [0, 1], for pasting on other backgrounds."""
        values = torch.from_numpy(self.pictures).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        return torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1).contiguous()


def write_pictures(world: World, folder: Path) -> int:
    """Each training concept in each style, `<style>/<concept>.png`, with the bare concept as caption in a .txt beside.

    Returns the number of pictures.
    """
    concepts, _ = split(world.concepts)
    drawn = dict(zip(world.concepts, (on_white(world.pictures) * 255).round().astype(np.uint8), strict=True))
    for concept in concepts:
        for style, picture in zip(STYLES, drawn[concept], strict=True):
            file = folder / style / f"{concept.replace(' ', '-')}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
            file.with_suffix(".txt").write_text(concept + "\n", encoding="ascii")
    return len(concepts) * len(STYLES)


def build_world(icons_folder: Path, file: Path) -> World:
    """Fetch, choose and draw, or read what an earlier call stored in `file`."""
    if not file.exists():
        fetch(icons_folder)
        names = candidate_names(icons_folder)
        pictures = render_all(icons_folder, names)
        kept = choose(names, pictures)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, names=np.array([names[index] for index in kept]), pictures=pictures[kept])
    stored = np.load(file)
    return World([concept_of(name) for name in stored["names"].tolist()], stored["pictures"])
