"""A transformer in one file, by the names of the repository that published it, which ComfyUI reads."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

Layers = Mapping[str, Sequence[str]]
"""A layer of theirs, and those of diffusers that it consists of, one below the other."""


class SingleFile(NamedTuple):
    """The names of a family's tensors in original single files, from diffusers' and back.

    Args:
        outer: layers and single parameters outside the blocks.
        blocks: by diffusers' name of a list of blocks: their name of it, and the layers of each block.
        swapped: prefixes of their names of layers that hold shift, then scale, where diffusers has scale, then shift.
        scales: ends of their names of layers whose weight is called scale.
        flat: ends of their names of parameters that are one row, where diffusers has several below each other.
        keeps_names: whether all others are called as in diffusers.
    """

    outer: Layers = MappingProxyType({})
    blocks: Mapping[str, tuple[str, Layers]] = MappingProxyType({})
    swapped: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    keeps_names: bool = False

    def sources(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Their name of each tensor, and diffusers' names of those that it consists of, in order.

        Args:
            names: all parameters of diffusers' transformer.

        Raises:
            ValueError: if one of them has no place there.
        """
        known = set(names)
        found: dict[str, list[str]] = {}
        for ours, theirs, layers in self._tables(known):
            for layer, parts in layers.items():
                for kind in ("", ".weight", ".bias"):
                    own = [f"{ours}{part}{kind}" for part in parts]
                    if known.issuperset(own):
                        found[f"{theirs}{layer}{'.scale' if layer.endswith(self.scales) else kind}"] = own
        left = sorted(known.difference(*found.values()))
        if self.keeps_names:
            found |= {name: [name] for name in left}
        elif left:
            raise ValueError(
                f"the original single file has no place for {len(left)} of the transformer's parameters, first "
                f"{left[0]}: export it with --format diffusers"
            )
        return found

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Their tensor of that name, from those of diffusers."""
        tensor = self._turned(name, torch.cat(list(parts)))
        return tensor.flatten() if name.endswith(self.flat) else tensor

    def shape(self, name: str, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of `joined`, from those of its parts."""
        shape = sum(rows for rows, *_ in parts), *parts[0][1:]
        return (math.prod(shape),) if name.endswith(self.flat) else shape

    def divided(self, name: str, tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """Undo `joined`, for parts with so many rows."""
        if name.endswith(self.flat):
            tensor = tensor.view(sum(rows), -1)
        return list(self._turned(name, tensor).split(list(rows)))

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        is_swapped = bool(self.swapped) and name.startswith(self.swapped)
        return torch.cat(tensor.chunk(2)[::-1]) if is_swapped else tensor

    def _tables(self, names: set[str]) -> list[tuple[str, str, Layers]]:
        """Prefixes of diffusers' names and of theirs, and the layers that follow these."""
        numbered = (re.match(r"([\w.]+?)\.(\d+)\.", name) for name in sorted(names))
        blocks = {found[0]: found for found in numbered if found and found[1] in self.blocks}
        inner = [
            (prefix, f"{self.blocks[found[1]][0]}.{found[2]}.", self.blocks[found[1]][1])
            for prefix, found in blocks.items()
        ]
        return [("", "", self.outer), *inner]
