"""Control words and where they come from. Whether a reward model understands them: `control-words` measures it."""

from types import MappingProxyType
from typing import NamedTuple


class WordList(NamedTuple):
    """Control words of one purpose.

    Args:
        positive: Words to move towards.
        negative: Words to move away from.
        source: Origin of the words, and what is known of them.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    source: str


REALISM = WordList(
    ("Natural-lighting", "Detail", "Detailed", "Real"),
    ("Concept art", "Painting", "Anime", "Flat", "Oil"),
    "arXiv 2509.06942 with its research code, under HPSv2.1; no published check under another reward model",
)

SEMANTIC_GUIDED = WordList(
    ("Realistic photo",),
    ("CG Render",),
    "arXiv 2509.06942, the pair of its SGP-HPS metric",
)

PUBLISHED = MappingProxyType({"realism": REALISM})
"""What to start from under a reward model for which no list of its own is published."""
