"""`python -m tools.emoji`: `build` the built-in model, `evaluate` it, write `pictures`, train a `preference` reward."""

from pathlib import Path

import torch
from jsonargparse import auto_cli

import srpo_lightning

from .bias import bias_table
from .build import Build, Steps
from .evaluate import evaluate_assets
from .preference import Annotators, train_preference
from .world import build_world, write_pictures

WORK = Path(".work/emoji")
ASSETS = Path(srpo_lightning.__file__).parent / "assets"


def build(work: Path = WORK, assets: Path = ASSETS, steps: Steps = Steps(), threads: int = 2) -> None:  # noqa: B008
    """Make the built-in model from nothing, or go on where an earlier call was stopped.

    Args:
        work: folder for pictures, checkpoints and logs.
        assets: folder that gets the finished models.
        steps: length of each stage.
        threads: CPU threads to train with.
    """
    torch.set_num_threads(threads)
    Build(work, assets, steps).everything()


def evaluate(work: Path = WORK, assets: Path = ASSETS) -> None:
    """Print the table of quality of the finished models, and write sample sheets into the work folder.

    Args:
        work: folder for the pictures and the sheets.
        assets: folder of the finished models.
    """
    print(evaluate_assets(assets, build_world(work / "icons", work / "world.npz"), work / "sheets"))


def pictures(output: Path, work: Path = WORK) -> None:
    """Write the pictures of the training concepts with their captions, to train on in the place of rollouts.

    Args:
        output: a folder; the styles become folders therein.
        work: folder for the icons.
    """
    print(f"{output}: {write_pictures(build_world(work / 'icons', work / 'world.npz'), output)} pictures")


def preference(
    output: Path,
    annotators: Annotators = Annotators(),  # noqa: B008
    steps: int = 400,
    seed: int = 6,
    work: Path = WORK,
    assets: Path = ASSETS,
    threads: int = 1,
) -> None:
    """Fine-tune the reward on the choices of simulated people, or go on where an earlier call was stopped.

    Prints how much of the new reward is the picture's alone, beside the reward that it started from and the judge.

    Args:
        output: folder that gets the reward.
        annotators: people who choose, by what a picture is worth to them.
        steps: length of the training.
        seed: number that every random draw follows from.
        work: folder for pictures, checkpoints and logs.
        assets: folder of the finished models.
        threads: CPU threads to train with.
    """
    torch.set_num_threads(threads)
    world = build_world(work / "icons", work / "world.npz")
    train_preference(assets / "emoji-clip", world, annotators, steps, seed, work, output)
    print(bias_table([output, assets / "emoji-clip", assets / "emoji-judge"], assets, world))


if __name__ == "__main__":
    auto_cli([build, evaluate, pictures, preference])
