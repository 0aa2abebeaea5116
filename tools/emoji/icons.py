"""Which pictures the emoji world consists of: five icon sets that draw the same things in five styles."""

import io
import json
import subprocess
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

PICTURE_SIZE_PX = 64

CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places")

# Words that name a variant, a sign or a scene rather than a thing that one could recognise at 64 pixels.
UNWANTED = """
    arrow bank banknote battery button card chain chains cityscape clock control convenience crescent cyclone dango
    department disk document dvd face flag gibbous hole hospital hotel incoming input japanese keycap locked love
    mahjong mailbox mark mate moon new night number oclock oden oncoming page post postbox quarter ribbon school
    selector sign speaker suit sunrise sunset symbol tabs thirty
"""
UNWANTED_WORDS = frozenset(UNWANTED.split())


class IconSet(NamedTuple):
    """One npm package of SVG icons; all of its icons share one drawing style."""

    style: str
    package: str
    version: str

    @property
    def archive(self) -> str:
        """File name that `npm pack` gives to the package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ICON_SETS = (
    IconSet("3d", "@iconify-json/fluent-emoji", "1.2.7"),
    IconSet("flat", "@iconify-json/fluent-emoji-flat", "1.2.6"),
    IconSet("ink", "@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    IconSet("cartoon", "@iconify-json/twemoji", "1.2.5"),
    IconSet("shaded", "@iconify-json/noto", "1.2.9"),
)

Pictures = npt.NDArray[np.uint8]  # [concept, style, H, W, RGBA]


def fetch(folder: Path) -> None:
    """Download the packages that `folder` lacks. Needs `npm` and a network."""
    folder.mkdir(parents=True, exist_ok=True)
    for icons in ICON_SETS:
        if not (folder / icons.archive).exists():
            subprocess.run(["npm", "pack", f"{icons.package}@{icons.version}"], cwd=folder, check=True)


def read_member(archive: Path, member: str) -> dict[str, Any]:
    """One JSON file out of a package archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise ValueError(f"{archive} holds no package/{member}: delete it and fetch it again")
        content: dict[str, Any] = json.load(file)
        return content


def is_plain(name: str) -> bool:
    """Whether a name is one to three common words: a concept that a prompt would use."""
    words = name.split("-")
    return len(words) <= 3 and all(word.isalpha() for word in words) and not UNWANTED_WORDS & set(words)


def candidate_names(folder: Path) -> list[str]:
    """Plain names in the wanted categories that all five sets draw, sorted."""
    members = [read_member(folder / icons.archive, "icons.json")["icons"] for icons in ICON_SETS]
    # The first set comes without categories; the second shares its names.
    categories = read_member(folder / ICON_SETS[1].archive, "metadata.json")["categories"]
    wanted = {name for category in CATEGORIES for name in categories[category]}
    shared = wanted.intersection(*(set(icons) for icons in members))
    return sorted(name for name in shared if is_plain(name))


def render(svg_body: str, width: float, height: float) -> Pictures:
    """Draw an SVG body at `PICTURE_SIZE_PX`, RGBA [H, W, 4], straight (not premultiplied) alpha."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    size = f'viewBox="0 0 {width} {height}" width="{PICTURE_SIZE_PX}" height="{PICTURE_SIZE_PX}"'
    svg = f'<svg {spaces} {size} color="black">{svg_body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=PICTURE_SIZE_PX, height=PICTURE_SIZE_PX)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def render_all(folder: Path, names: list[str]) -> Pictures:
    """Every name in every style: uint8 [concept, style, H, W, RGBA]."""
    columns = []
    for icons in ICON_SETS:
        collection = read_member(folder / icons.archive, "icons.json")
        width, height = collection.get("width", 16), collection.get("height", 16)
        drawn = [collection["icons"][name] for name in names]
        columns.append(
            np.stack([render(icon["body"], icon.get("width", width), icon.get("height", height)) for icon in drawn])
        )
    return np.stack(columns, axis=1)


def on_white(pictures: Pictures) -> npt.NDArray[np.float32]:
    """Blend RGBA onto white: float32 [..., H, W, 3] in [0, 1]."""
    values = pictures.astype(np.float32) / 255
    alpha = values[..., 3:]
    blended: npt.NDArray[np.float32] = (values[..., :3] * alpha + (1 - alpha)).astype(np.float32)
    return blended


def is_well_drawn(pictures: Pictures) -> npt.NDArray[np.bool_]:
    """Whether a concept fills a fair part of the square in each style but never all of it, [concept].

    Icons that cover everything are scenes (a city at night); those that cover little vanish in 64 latent cells.
    """
    coverage = (pictures[..., 3] > 127).mean((-1, -2))
    good: npt.NDArray[np.bool_] = ((coverage > 0.15) & (coverage < 0.85)).all(1)
    return good


def agreement(pictures: Pictures) -> npt.NDArray[np.float32]:
    """How alike the five drawings of one concept are: mean intersection over union of silhouettes, [concept]."""
    masks = pictures[..., 3] > 127
    pairs = list(combinations(range(masks.shape[1]), 2))
    overlap = [
        (masks[:, a] & masks[:, b]).sum((-1, -2)) / (masks[:, a] | masks[:, b]).sum((-1, -2)).clip(1) for a, b in pairs
    ]
    mean: npt.NDArray[np.float32] = np.mean(overlap, axis=0).astype(np.float32)
    return mean


def differences(pictures: Pictures) -> npt.NDArray[np.float32]:
    """Root-mean-square difference between concepts in the same style at 16 x 16, mean of styles, [concept, concept]."""
    concepts, styles, size = *pictures.shape[:2], PICTURE_SIZE_PX // 4
    small = on_white(pictures).reshape(concepts, styles, size, 4, size, 4, 3).mean((3, 5)).reshape(concepts, styles, -1)
    total = np.zeros((concepts, concepts), np.float32)
    for style in range(styles):
        rows = small[:, style]
        squares = (rows**2).mean(1)
        product = rows @ rows.T / rows.shape[1]
        total += np.sqrt((squares[:, None] + squares[None] - 2 * product).clip(0))
    mean: npt.NDArray[np.float32] = total / styles
    return mean


def familiarity(name: str) -> float:
    """What is added to a concept's agreement: one-word names are what people ask for first."""
    return {1: 0.25, 2: 0.15}.get(len(name.split("-")), 0.0)


def choose(names: list[str], pictures: Pictures, count: int = 320, smallest_difference: float = 0.15) -> list[int]:
    """Indices of the concepts to keep: well drawn, alike across styles, distinct from each other.

    Greedy: familiar concepts whose five drawings agree come first, and each one shuts out its look-alikes and, at
    the second time, other concepts that end in the same word ("red apple" and "green apple", but no third train).
    """
    difference, similar, good = differences(pictures), agreement(pictures), is_well_drawn(pictures)
    score = similar + np.array([familiarity(name) for name in names], np.float32)
    chosen: list[int] = []
    kinds: Counter[str] = Counter()
    for index in np.argsort(-score, kind="stable").tolist():
        kind = names[index].split("-")[-1].rstrip("s")
        distinct = (difference[index, chosen] > smallest_difference).all() and kinds[kind] < 2
        if len(chosen) < count and good[index] and similar[index] > 0.35 and distinct:
            chosen.append(index)
            kinds[kind] += 1
    return sorted(chosen, key=lambda index: names[index])
