"""Run folders with pictures whose colours tell whose they are, and studies in which raters are known."""

import json
from pathlib import Path

import yaml
from PIL import Image

from srpo_lightning.evaluation.pictures import write_picture
from srpo_lightning.ratings.answers import Answers
from srpo_lightning.ratings.plan import GRADES, Plan
from srpo_lightning.ratings.turns import Study
from srpo_lightning.run_folder import RunFolder
from tests.report.made_up import CONFIG, MARKUP

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
PROMPTS = [f"prompt {number}" for number in range(13)] + [MARKUP + " ${1 + 1} {{#each value}}"]


def write_run(
    path: Path, colour: tuple[int, int, int], prompts: list[str] = PROMPTS, quality: float = 0.0, step: int = 20
) -> RunFolder:
    """A run with a picture of each prompt after `step` steps, of one colour but for a pixel that tells the prompt.

    Its `good` score rises with the prompt's number and with `quality`, `bad` falls with it, `half` is of even pictures.
    """
    run = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    run.config().write_text(yaml.safe_dump(CONFIG))
    for index, prompt in enumerate(prompts):
        add_picture(run, step, "policy", index, prompt, colour, quality)
    return run


def add_picture(
    run: RunFolder,
    step: int,
    weights: str,
    index: int,
    prompt: str,
    colour: tuple[int, int, int],
    quality: float = 0.0,
    size: tuple[int, int] = (48, 48),
) -> None:
    """Write one picture and its record."""
    scores = {"good": index + quality, "bad": -quality - index, "brightness": 0.5, "nothing": None}
    if index % 2 == 0:
        scores["half"] = quality
    record = {
        "step": step, "weights": weights, "index": index, "seed": 3, "prompt": prompt, "guidance": 2.0, "num_steps": 7,
        "file": run.samples.name(step, weights, index), "scores": scores,
    }  # fmt: skip
    picture = Image.new("RGB", size, colour)
    picture.putpixel((0, 0), (index, index, index))
    write_picture(run.samples.picture(step, weights, index), picture, record)
    with run.samples.metadata.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def study_of(plan: Plan, folder: Path) -> Study:
    """A study without answers."""
    return Study(plan, Answers(folder / "answers"))


def answer_all(study: Study, rater: str, better: int, but: int = 0) -> None:
    """Let a rater answer everything, and prefer a source; `but` prompts are judged the other way round.

    A grade is `good` of the better source and `pass` of any other.
    """
    while turn := study.turn(rater):
        is_other = study.plan.items[turn.item].prompt in PROMPTS[:but]
        first = turn.pictures[0].source
        if study.plan.task == "grades":
            value = GRADES[2] if (first == better) != is_other else GRADES[1]
        else:
            value = "left" if (first == better) != is_other else "right"
        assert study.answer(rater, turn.number, value)
