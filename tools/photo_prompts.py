"""The prompts for photographs that recipes start from: `python -m tools.photo_prompts`.

Each is a scene under one of its kind's lights or views (photo_prompts.yaml); the evaluation has scenes of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

FOLDER = Path("srpo_lightning/assets/prompts")
TRAIN, EVALUATION = "photo_train.jsonl", "photo_eval.jsonl"
NUM_TRAIN_SCENES, NUM_TRAIN_VIEWS, NUM_EVALUATION_VIEWS = 25, 4, 2
MATERIAL: dict[str, dict[str, list[str]]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))

Record = dict[str, str | list[str]]


def prompts(kind: str, scenes: list[str], num_views: int) -> Iterator[Record]:
    """Each scene under views that follow each other, so that all come equally often."""
    views = MATERIAL[kind]["views"]
    for number, scene in enumerate(scenes):
        for turn in range(num_views):
            view = views[(number + turn * (len(views) // num_views)) % len(views)]
            yield {"prompt": f"{scene}, {view}", "tags": [kind]}


def both() -> tuple[list[Record], list[Record]]:
    """The prompts to train on, and those to evaluate."""
    train: list[Record] = []
    evaluation: list[Record] = []
    for kind, material in MATERIAL.items():
        train += prompts(kind, material["scenes"][:NUM_TRAIN_SCENES], NUM_TRAIN_VIEWS)
        evaluation += prompts(kind, material["scenes"][NUM_TRAIN_SCENES:], NUM_EVALUATION_VIEWS)
    return train, evaluation


def main() -> None:
    """Write both files."""
    for name, records in zip((TRAIN, EVALUATION), both(), strict=True):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{FOLDER / name}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
