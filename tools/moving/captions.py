"""What is written under the clips: "3d. red apple, spinning", and parts of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from tools.emoji.captions import STYLES
from tools.emoji.captions import caption as picture_caption

from .motions import MOTIONS

FORMS = (0.35, 0.25, 0.1, 0.2, 0.1)
"""How often a caption is whole, without a style, without a motion, a bare concept, and empty."""


def caption(style: str, concept: str, motion: str) -> str:
    """The caption of one clip; any part may be empty."""
    return picture_caption(style, ", ".join(part for part in (concept, motion) if part))


class Captions(NamedTuple):
    """Every caption of the world once, and where which form lies.

    Attributes:
        texts: whole captions [concept * style * motion], then those without a style [concept * motion], without a
            motion [concept * style], bare concepts, and the empty one.
        num_concepts: C.
    """

    texts: list[str]
    num_concepts: int

    @staticmethod
    def of(concepts: list[str]) -> "Captions":
        """All captions of these concepts."""
        texts = [caption(style, concept, motion) for concept in concepts for style in STYLES for motion in MOTIONS]
        texts += [caption("", concept, motion) for concept in concepts for motion in MOTIONS]
        texts += [caption(style, concept, "") for concept in concepts for style in STYLES]
        return Captions([*texts, *concepts, ""], len(concepts))

    def draw(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """A caption for each of some clips, by its number.

        Args:
            rows: numbers of the clips, (concept * styles + style) * motions + motion.
            draw: source of the forms.
        """
        styles, motions = len(STYLES), len(MOTIONS)
        picture, motion = rows // motions, rows % motions
        concept = picture // styles
        without_style = self.num_concepts * styles * motions
        without_motion = without_style + self.num_concepts * motions
        bare = without_motion + self.num_concepts * styles
        by_form = [
            rows,
            without_style + concept * motions + motion,
            without_motion + picture,
            bare + concept,
            torch.full_like(rows, len(self.texts) - 1),
        ]
        form = torch.multinomial(torch.tensor(FORMS), len(rows), replacement=True, generator=draw)
        return torch.stack(by_form).gather(0, form[None])[0]
