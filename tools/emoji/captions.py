"""What is written under the pictures: styles, caption forms, and which concepts are kept for evaluation."""

from pathlib import Path

from .icons import ICON_SETS

STYLES = tuple(icons.style for icons in ICON_SETS)
EVAL_EVERY = 5  # of the sorted concepts each fifth is kept for evaluation: 64 of 320


def concept_of(name: str) -> str:
    """The concept as a prompt writes it: "red-apple" becomes "red apple"."""
    return name.replace("-", " ")


def caption(style: str, concept: str) -> str:
    """The caption of one picture. Either part may be empty: "3d. red apple", "red apple", "3d", ""."""
    return ". ".join(part for part in (style, concept) if part)


def split(concepts: list[str]) -> tuple[list[str], list[str]]:
    """Concepts for training and for evaluating a policy; the small models themselves see all of them."""
    held_out = concepts[EVAL_EVERY - 1 :: EVAL_EVERY]
    return [concept for concept in concepts if concept not in set(held_out)], held_out


def write_prompts(folder: Path, concepts: list[str]) -> None:
    """One bare concept a line: `train.txt`, `eval.txt`; one style word a line: `styles.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = split(concepts)
    for file, lines in (("train.txt", train), ("eval.txt", held_out), ("styles.txt", list(STYLES))):
        (folder / file).write_text("\n".join(lines) + "\n", encoding="ascii")


def read_prompts(folder: Path, file: str) -> list[str]:
    """The lines that `write_prompts` wrote."""
    return (folder / file).read_text(encoding="ascii").split("\n")[:-1]
